"""`python -m symphony_hf.cli`, which `symphony` is."""

from . import main

main()
