"""Routing diagnostics on real text, which `symphony routing` measures and draws."""
