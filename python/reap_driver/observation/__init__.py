"""Observation: runs a model on calibration data and collects statistics of its experts."""
