"""Inference: labels, surveys, spectra, similar stars, explanations."""
