"""Training a Symphony model: the Trainer callback, and the runner of recipes."""

from .callback import SymphonyCallback

__all__ = ["SymphonyCallback"]
