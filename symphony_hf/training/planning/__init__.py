"""Requirements of a recipe before it runs: memory by part, largest micro-batch, tokens, hours. Loads no weights."""
