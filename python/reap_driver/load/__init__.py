"""Loads a checkpoint for observation: resident, or one decoder layer at a time."""
