"""Training of Symphony models: the Trainer callback, the recipe runner, resuming, and plans."""
