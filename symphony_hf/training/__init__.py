"""Training of Symphony models: the Trainer callback and the recipe runner."""

from .callback import SymphonyCallback

__all__ = ["SymphonyCallback"]
