"""Models in memory: their MoE layers, how to observe them, and which tensors hold experts."""
