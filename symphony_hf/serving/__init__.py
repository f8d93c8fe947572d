"""Inference engines that serve Symphony checkpoints as they are."""
