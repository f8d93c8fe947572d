"""Ablation studies: a grid of small training runs around a base point, each in a process of its own."""
