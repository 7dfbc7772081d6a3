"""Faults made on purpose to a whole run, and what the run makes of them: ``espalier chaos``."""
