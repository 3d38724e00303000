"""What runs inside vLLM's workers: masks and statistics of MoE layers, and calls to set them."""
