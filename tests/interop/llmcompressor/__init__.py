"""Tests against llm-compressor: our observation in its pruning, and its quantization after ours."""
