"""Calibration: turn a model into a parent, and measure every slice of it. Never imports vLLM."""
