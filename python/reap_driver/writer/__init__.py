"""Writes the pruned checkpoint: files in, files out, in constant memory."""
