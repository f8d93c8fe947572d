"""Blocks of README.md, between `<!-- name -->` and `<!-- end -->`."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.S).group(1)
