"""What a run takes and what a machine has: sizes, rates, and whether to stream layers."""
