"""Run the matrix: every family against every check."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tqdm import tqdm
from transformers.utils import logging

from symphony_hf.compat import transformers_version
from symphony_hf.errors import ConfigError, SymphonyWarning, nearest
from symphony_hf.patching.families.capability import Capabilities, Supported, Unsupported, capabilities

from .checks import CHECKS, ConformanceError
from .specimen import Specimen
from .tiny import moe_families, tiny_model, why_not_built


@dataclass(frozen=True)
class NotApplicable:
    """A check that means nothing for the family.

    Attributes:
        reason: Why.
    """

    reason: str


@dataclass(frozen=True)
class Failed:
    """A check that does not hold: a bug of ours, or a family that moved.

    Attributes:
        complaint: What was found.
    """

    complaint: str

    def __str__(self) -> str:
        return f"FAILED: {self.complaint}"


Result = Supported | NotApplicable | Failed


@dataclass(frozen=True)
class Row:
    """One family in the matrix.

    Attributes:
        family: Its model type.
        able: What its routers can do; None where it has no tiny model.
        results: By check; empty where nothing was checked.
        not_built: Why it has no tiny model.
    """

    family: str
    able: Capabilities | None = None
    results: Mapping[str, Result] = field(default_factory=dict)
    not_built: str | None = None

    @property
    def failures(self) -> list[str]:
        return [name for name, result in self.results.items() if isinstance(result, Failed)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, logs and progress bars of the families' own; our warnings are errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", category=SymphonyWarning)
            warnings.filterwarnings("ignore", ".*one expert per token", SymphonyWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def look_at_family(family: str) -> Row:
    """Build a family tiny and see what its routers can do."""
    if reason := why_not_built(family):
        return Row(family, not_built=reason)
    with quiet():
        return Row(family, capabilities(tiny_model(family)))


def check_family(family: str) -> Row:
    """Build a family tiny and run every check on it, where its routers are not refused."""
    row = look_at_family(family)
    if row.able is None or isinstance(row.able.logits, Unsupported):
        return row
    with quiet():
        specimen = Specimen(family)
        return Row(family, row.able, {name: run_check(name, specimen) for name in CHECKS})


def run_check(name: str, specimen: Specimen) -> Result:
    """Run one check; whatever is raised in it is its result."""
    try:
        reason = CHECKS[name](specimen)
    except ConformanceError as error:
        return Failed(str(error))
    except Exception as error:  # noqa: BLE001 - nothing is hidden: the matrix shows it, and goes on with the next
        return Failed(f"{type(error).__name__}: {error}")
    return Supported() if reason is None else NotApplicable(reason)


def run_matrix(families: list[str], check: bool, progress: bool = True) -> list[Row]:
    """Look at families, or check them.

    Args:
        families: Model types.
        check: Whether to run the checks, about a second a family.
        progress: Whether to show a bar.
    """
    run = check_family if check else look_at_family
    with tqdm(families, disable=not progress, unit="family") as bar:
        rows = []
        for family in bar:
            bar.set_postfix_str(family)
            rows.append(run(family))
    return rows


def known_families(families: Iterable[str] | None) -> list[str]:
    """The families asked for; all when there are none.

    Raises:
        ConfigError: If one is unknown.
    """
    known = moe_families()
    asked = list(families or known)
    for family in asked:
        if family not in known:
            hint = nearest(family, known)
            raise ConfigError(f"{family!r} is no MoE family of transformers {transformers_version()}; {hint}")
    return asked
