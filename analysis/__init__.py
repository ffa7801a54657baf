"""Nouns, model index, calibration, metrics and verification."""
