"""Readers of data sets as they are distributed: annotations first, pictures when they are decoded."""
