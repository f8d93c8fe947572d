"""How many sequences a run trains on."""

from pathlib import Path

from ..data import prepare_data
from ..recipe import Recipe
from ..training.processors import load_processor
from .settings import TrainSettings

GLUE_EXAMPLES = {
    "cola": 8_551,
    "mnli": 392_702,
    "mrpc": 3_668,
    "qnli": 104_743,
    "qqp": 363_846,
    "rte": 2_490,
    "sst2": 67_349,
    "wnli": 635,
}
"""Of the training splits, as GLUE publishes them."""


def sequences_of_data(recipe: Recipe) -> int | None:
    """Sequences of one epoch; None where only the data itself, from the Hub, would tell.

    Data that is on every machine, or in files here, is read and counted, if the tokenizer is here, too.

    Raises:
        DataError: If data that is here is not as the recipe's kind needs it.
    """
    data, source = recipe.data, recipe.model.tokenizer or recipe.model.path
    if data.kind == "glue" and data.path is None and data.name in GLUE_EXAMPLES:
        count = GLUE_EXAMPLES[data.name]
        return count if data.limit is None else min(count, data.limit)
    data_is_here = data.path in (None, "embedded") or Path(str(data.path)).expanduser().exists()
    tokenizer_is_here = source is None or Path(source).expanduser().exists()
    if not data_is_here or not tokenizer_is_here or data.streaming:
        return None
    prepared = prepare_data(data, load_processor(recipe), seed=0)
    if data.kind == "chat" and data.packing:  # TRL packs when it trains
        return None if prepared.num_tokens is None else -(-prepared.num_tokens // data.block_size)
    return len(prepared.train)


def sequences_of_run(settings: TrainSettings, processes: int, of_data: int | None) -> int | None:
    """Sequences of a whole run, over all epochs and devices; None where the data's are needed, and not known."""
    if settings.max_steps > 0:
        return settings.max_steps * settings.micro_batch * settings.accumulation * processes
    return None if of_data is None else round(settings.epochs * of_data)
