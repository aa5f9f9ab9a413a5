"""Readers of data sets in their published formats: annotations first, images when they are decoded."""
