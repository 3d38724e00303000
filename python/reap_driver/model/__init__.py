"""What is known of a model: its MoE layers, their adapters, and which tensors hold experts."""
