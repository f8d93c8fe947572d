"""Single bad rows: left out and counted, unless they are too many to be single."""

from collections import Counter
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

MOST_SKIPPED = 0.1
"""Share of the rows that may be left out. More is no bad row, but a wrong setting or a wrong file."""

PROBLEM = "problem"
"""Column of what is wrong with a row: empty, or `<what>: <which>`, counted by the first part."""


def without_problems(rows: "Dataset", where: str, notes: list[str]) -> "Dataset":
    """Leave out the rows that have a problem.

    Args:
        rows: With the column `problem`, which is taken away.
        where: What they are, in notes and errors.
        notes: Gets a line if any row is left out.

    Returns:
        The other rows, in their order.

    Raises:
        DataError: If more than a tenth of the rows have a problem, or no row is left.
    """
    problems: list[str] = rows[PROBLEM][:]
    kept = [index for index, problem in enumerate(problems) if not problem]
    num_skipped = len(problems) - len(kept)
    rows = rows.remove_columns(PROBLEM)
    if not problems:
        raise DataError(f"{where}: no rows; give a source that has some, or leave the split out")
    if num_skipped == 0:
        return rows
    counts = Counter(problem.partition(": ")[0] for problem in problems if problem)
    counted = ", ".join(f"{count:,} {what}" for what, count in counts.most_common())
    if num_skipped > MOST_SKIPPED * len(problems):
        first = next(index for index, problem in enumerate(problems) if problem)
        raise DataError(
            f"{where}: {num_skipped:,} of {len(problems):,} rows cannot be used: {counted}. The first is row {first} "
            f"({problems[first]}). At most {MOST_SKIPPED:.0%} are left out: mend the rows, or the setting that rules "
            "them out"
        )
    notes.append(f"{where}: {num_skipped:,} of {len(problems):,} rows were left out: {counted}")
    return rows.select(kept)
