"""Observes a model: one run over calibration batches, statistics of every expert."""
