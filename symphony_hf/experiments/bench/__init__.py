"""Benchmarks: what the graph costs, at the true shapes of models."""
