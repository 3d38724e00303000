"""Pruned checkpoints in MLX: `make test-engines ENVS=mlx`."""
