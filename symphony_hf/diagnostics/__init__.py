"""Metrics of routing, experts and co-selection graphs. `symphony_hf.diagnostics.plots` has the pictures."""
