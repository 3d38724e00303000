"""Checkpoints in the formats of compressed-tensors, read without that library."""
