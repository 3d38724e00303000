"""Writes the pruned checkpoint from the files of the source, in constant memory."""
