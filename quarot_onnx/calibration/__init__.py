"""Calibration data and what is collected over it."""
