"""Models in memory: their MoE layers, adapters for observing them, and which tensors hold
experts.
"""
