"""Files of a checkpoint: safetensors headers, fingerprints, quantization, replacing folders."""
