"""Measure a parent: perplexity at every profile, and plain models with the weights that a slice has."""
