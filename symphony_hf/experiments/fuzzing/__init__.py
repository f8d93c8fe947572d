"""Fuzzing of checkpoints: a tampered file loads with valid graphs, or is refused by a SymphonyError."""
