"""Compression to fewer experts, or fewer per token, with its cost in perplexity on held-out text."""
