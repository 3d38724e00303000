"""Pruned checkpoints as GGUF in llama.cpp: `make test-engines ENVS=llamacpp`."""
