"""Files of a checkpoint: the safetensors container, pinned files, how weights are stored."""
