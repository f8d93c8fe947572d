"""Our card brought into a README that is there already: its words stay, and so does its metadata."""

from huggingface_hub import ModelCard
from yaml import YAMLError

from ..errors import PushError
from .card import BEGIN, END
from .origin import Origin

_TO_FILL_IN = "[More Information Needed]"


def merge_cards(existing: str, card: ModelCard, said: Origin | None, where: str) -> str:
    """Add to a README's metadata what it lacks; lists are united, and the model-index is this push's.

    What an earlier push wrote, between its marks, is written anew; all other words stay.

    Args:
        existing: Text of the README that is there.
        card: Ours.
        said: What the user says of the model's origin, which goes before what is there.
        where: The README is, for the error message.

    Raises:
        PushError: If the metadata of the one that is there cannot be read.
    """
    try:
        merged = ModelCard(existing)
    except (ValueError, KeyError, TypeError, YAMLError) as error:
        raise PushError(f"{where}: its metadata cannot be read ({error}): mend it, or move it away") from error
    data = merged.data
    for key, value in vars(card.data).items():
        there = data.get(key)
        if isinstance(value, list) and key != "eval_results":
            there = [there] if isinstance(there, str) else list(there or [])
            data[key] = [*there, *(item for item in value if item not in there)]
        elif value is not None and (there is None or key in ("eval_results", "model_name")):
            data[key] = value
    for key, value in vars(said or Origin()).items():
        if value is not None and key != "data":
            data[key] = value
    before, begin, rest = merged.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        ours = card.text[card.text.index(BEGIN) : card.text.index(END)]
        merged.text = f"{before}{ours}{END}{after}"
    return str(merged)


def is_template(readme: str) -> bool:
    """Whether it is the Hub's template, as PEFT writes it into each adapter, with nothing filled in."""
    return readme.count(_TO_FILL_IN) > 20
