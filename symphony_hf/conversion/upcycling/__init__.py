"""Sparse upcycling: dense checkpoints become MoE checkpoints, from file to file."""
