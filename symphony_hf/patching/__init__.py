"""Give a model Symphony routing: `symphonize`, and what it puts into a model."""
