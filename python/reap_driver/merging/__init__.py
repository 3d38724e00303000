"""Merging experts instead of removing them, HC-SMoE and M-SMoE, in memory, for comparison."""
