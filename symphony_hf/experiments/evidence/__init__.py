"""EVIDENCE.md: what was run, next to the paper's numbers, written from result files alone."""
