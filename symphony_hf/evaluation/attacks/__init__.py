"""Attacks on a model's inputs: changed letters and words in text, and ImageNet-C's corruptions of images."""
