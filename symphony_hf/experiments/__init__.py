"""Benchmarks, checks and studies: what shows that the rest of the package is right, fast and useful."""
