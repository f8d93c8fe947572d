"""The same training in every arrangement: accumulation, ranks, ZeRO, checkpointing, compile."""
