"""Invariance of training: accumulation, ranks, ZeRO, checkpointing, packing and compile give the same graphs."""
