"""Robustness of a model to attacks on its inputs, alone or against another model."""
