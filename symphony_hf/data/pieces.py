"""Where a large text is cut into documents."""

from collections.abc import Iterable, Iterator

_PIECE = 2_000
"""Characters. A document of a large file ends at the first blank line after as many."""

_LONGEST_PIECE = 4 * _PIECE
"""Characters. It ends at the end of a line after as many, in a file without blank lines."""


def pieces_of(lines: Iterable[str]) -> Iterator[str]:
    """Group lines into pieces, which concatenated are the lines again."""
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= _LONGEST_PIECE or (size >= _PIECE and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
