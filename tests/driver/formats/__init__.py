"""Checkpoints in every storage format, and what can be done with them."""
