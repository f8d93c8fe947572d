"""Entry point of `python -m symphony_hf.cli`, the same as `symphony`."""

from . import main

main()
