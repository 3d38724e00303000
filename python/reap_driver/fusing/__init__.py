"""Norms, residual additions and rotary embeddings in fewer kernels, while a model is observed."""
