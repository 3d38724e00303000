"""Tests of merging experts."""
