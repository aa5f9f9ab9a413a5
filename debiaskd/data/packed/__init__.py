"""Prepared data: decoded once, written in shards, read by mapping."""
