"""Loads checkpoints for observation: whole (resident), or one decoder layer at a time
(streamed).
"""
