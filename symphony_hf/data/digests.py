"""SHA-256 of what was read: the same on every machine, so that results can say what they come from."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def digest_texts(texts: Iterable[str]) -> str:
    """Of texts in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))  # so that ["ab", "c"] is not ["a", "bc"]
        digest.update(encoded)
    return digest.hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """Of anything that JSON can write, row by row."""
    return digest_texts(json.dumps(row, sort_keys=True) for row in rows)


def digest_files(paths: Iterable[Path]) -> str:
    """Of the contents of files in their order; their names do not matter."""
    whole = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        whole.update(digest.digest())
    return whole.hexdigest()
