"""Calibration data: from files and data sets to batches of token ids."""
