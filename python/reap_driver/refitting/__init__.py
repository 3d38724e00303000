"""Re-fits the experts of a pruned model to its original, layer by layer."""
