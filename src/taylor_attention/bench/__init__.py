"""Measurements, figures and the demonstration."""
