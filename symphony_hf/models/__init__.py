"""Models and modules of this package: upcycled MoE layers, their routers, LLaVA, and the WikiText model."""
