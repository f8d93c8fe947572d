"""The smaller checkpoint, written whole or not at all, and measured as it will be loaded."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..unfinished import write_json
from ..upcycling.target import writing

RESULT = "result.json"


def write_and_measure(
    smaller: PreTrainedModel,
    tokenizer: Any,
    target: Path,
    measure: Callable[[PreTrainedModel], dict[str, Any]],
    result_file: str | None,
    command: str,
) -> dict[str, Any]:
    """Save a model and its tokenizer, load it again by the Auto class, measure that, and give the folder its name.

    Args:
        smaller: The model.
        tokenizer: Its own.
        target: The folder.
        measure: Called with the loaded model; returns what the result file holds.
        result_file: Where that goes; into the folder when None.
        command: For error messages.

    Returns:
        What `measure` did.

    Raises:
        CheckpointError: If it cannot be written.
    """
    with writing(target, command) as folder:
        smaller.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        dtype, device = smaller.dtype, smaller.device
        del smaller
        gc.collect()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
        assert loaded.dtype == dtype
        result = measure(loaded.eval())
        if result_file is None:
            write_json(folder / RESULT, result)
    if result_file is not None:
        write_json(Path(result_file), result)
    return result
