"""Experts in 4 bits, packed by bitsandbytes during loading or in place, and the memory that they take."""
