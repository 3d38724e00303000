"""Observing a checkpoint one decoder layer at a time: each is read once, for all batches."""
