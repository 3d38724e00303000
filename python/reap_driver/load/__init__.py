"""Loads checkpoints for observation: whole (resident) or layer by layer (streamed)."""
