"""Benchmarks: one file a question; every speed is a ratio against a named baseline in one run."""
