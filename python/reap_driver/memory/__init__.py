"""Memory and time of a run: model sizes, free memory, measured rates, and whether to stream."""
