"""Helpers that every package may import: argument checks, signals, threads, units, YAML."""
