"""Argument checks and atomic files: what every other package may use."""
