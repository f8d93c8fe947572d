"""The conformance matrix: every family against every check."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm
from transformers.utils import logging

from symphony_hf.compat import transformers_version
from symphony_hf.errors import ConfigError, SymphonyWarning, nearest
from symphony_hf.patching.families.capability import Capabilities, Supported, Unsupported, capabilities

from .checks import CHECKS
from .specimen import ConformanceError, Specimen
from .tiny import moe_families, tiny_model, why_not_built


@dataclass(frozen=True)
class NotApplicable:
    """A check that does not apply to the family, and why."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A check that fails: a bug of ours, or a family that changed."""

    complaint: str

    def __str__(self) -> str:
        return f"FAILED: {self.complaint}"


Result = Supported | NotApplicable | Failed


@dataclass(frozen=True)
class FamilyResult:
    """One family in the matrix.

    Attributes:
        family: Its model type.
        able: Capabilities of its routers; None if it has no tiny model.
        results: Results by check; empty if none was run.
        not_built: Reason why it has no tiny model: a known one, or the error of building it.
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
    """Silence the families' warnings, logs and progress bars; our own warnings become errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", category=SymphonyWarning)
            warnings.filterwarnings("ignore", ".*one expert per token", SymphonyWarning)
            warnings.filterwarnings("ignore", "export_folded: ", SymphonyWarning)  # settings that engines ignore
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def inspect_family(family: str) -> FamilyResult:
    """Build a family's tiny model, and find the capabilities of its routers."""
    if reason := why_not_built(family):
        return FamilyResult(family, not_built=reason)
    with quiet():
        return FamilyResult(family, capabilities(tiny_model(family)))


def check_family(family: str) -> FamilyResult:
    """Build a family's tiny model and run every check on it, unless its routers are refused."""
    if reason := why_not_built(family):
        return FamilyResult(family, not_built=reason)
    with quiet():
        specimen = Specimen(family)
        able = capabilities(specimen.base)
        if isinstance(able.logits, Unsupported):
            return FamilyResult(family, able)
        return FamilyResult(family, able, {name: run_check(name, specimen) for name in CHECKS})


def run_check(name: str, specimen: Specimen) -> Result:
    """Run one check; an error in it is its result."""
    try:
        reason = CHECKS[name](specimen)
    except ConformanceError as error:
        return Failed(str(error))
    except Exception as error:  # noqa: BLE001 - the matrix shows the error, and continues with the next check
        return Failed(f"{type(error).__name__}: {error}")
    return Supported() if reason is None else NotApplicable(reason)


def run_matrix(names: Sequence[str], check: bool) -> list[FamilyResult]:
    """Inspect or check the named families, all if there are none.

    Raises:
        ConfigError: If a family is unknown.
    """
    known = moe_families()
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(f"{name!r} is no MoE family of transformers {transformers_version()}; {hint}")
    rows = []
    with tqdm(names or known, unit="family", disable=None) as bar:
        for family in bar:
            bar.set_postfix_str(family)
            rows.append(_row(family, check))
    return rows


def _row(family: str, check: bool) -> FamilyResult:
    try:
        return check_family(family) if check else inspect_family(family)
    except Exception as error:  # noqa: BLE001 - a release may break a family, and the matrix continues with the next
        reason = f"{type(error).__name__}: {error}"
        return FamilyResult(family, results={"build": Failed(reason)} if check else {}, not_built=reason)
