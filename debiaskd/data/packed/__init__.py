"""Prepared data: decoded once, written in shards, memory-mapped for reading."""
