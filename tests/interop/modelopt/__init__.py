"""Tests against NVIDIA ModelOpt."""
