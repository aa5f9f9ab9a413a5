"""Evaluate, explain and probe the networks of a finished run."""
