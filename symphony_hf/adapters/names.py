"""The names by which PEFT finds what an adapter is put on: ends of names, as short as they can be."""

from collections.abc import Callable, Collection, Iterable


def is_end_of(name: str, end: str) -> bool:
    """Whether PEFT takes a name of `target_modules` or `target_parameters` for this module or parameter."""
    return name == end or name.endswith(f".{end}")


def shortest_ends(
    wanted: Iterable[str], names: Collection[str], matches: Callable[[str, str], bool] = is_end_of, parts: int = 1
) -> list[str]:
    """The shortest ends of names, at their dots, that match all wanted ones and no other.

    Args:
        wanted: Names of modules, or of parameters.
        names: All of the model.
        matches: Whether PEFT takes an end for a name: for `modules_to_save` it does without regard to dots.
        parts: How many parts of a name an end has at least, so that a reader sees what it is of.
    """
    wanted = set(wanted)
    others = [name for name in names if name not in wanted]
    unique: dict[str, bool] = {}
    ends = set()
    for name in sorted(wanted):
        pieces = name.split(".")
        for count in range(min(parts, len(pieces)), len(pieces) + 1):
            end = ".".join(pieces[-count:])
            if end not in unique:
                unique[end] = not any(matches(other, end) for other in others)
            if unique[end]:
                ends.add(end)
                break
        else:
            ends.add(name)  # its whole name is another's end: PEFT cannot tell the two apart
    return sorted(ends)
