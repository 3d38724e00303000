"""Tests against GPTQModel."""
