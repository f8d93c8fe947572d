"""The benchmark of whole training steps on a GPU."""
