"""Evaluation: perplexity by document, accuracy, routing under attack, and confidence intervals of comparisons."""
