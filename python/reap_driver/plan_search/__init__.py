"""Searches for the best plan: how many experts each layer loses, or the shape of all layers."""
