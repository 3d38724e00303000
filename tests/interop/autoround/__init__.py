"""Tests against AutoRound, bitsandbytes and torchao."""
