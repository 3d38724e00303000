"""Calibration data: reads records from files and hub data sets, and makes batches of token ids."""
