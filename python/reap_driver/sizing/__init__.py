"""What a run takes and what a machine has: sizes, bandwidths, and whether to stream layers."""
