"""One run at a time in an output folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainingArguments

from symphony_hf.errors import CheckpointError, ConfigError
from symphony_hf.locks import locked

LOCK = "_symphony_run.lock"
"""Name of the lock's file. Trainer does not push names that begin with `_` to the Hub."""


@contextlib.contextmanager
def only_run_in(output: Path, command: str, arguments: TrainingArguments | None = None) -> Iterator[None]:
    """Keep other runs out of an output folder until the block or this process ends. Every process calls this.

    The first process holds the lock, and all of them learn whether it does. Where the file system has no locks, the
    block runs without one. The folder is created, and removed in the end if it is empty.

    Args:
        output: The output folder.
        command: Name of the command, for the error message.
        arguments: Training arguments, which know the processes; None for a single one.

    Raises:
        ConfigError: If another run has the lock, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if arguments is None or arguments.process_index == 0:
            try:
                held.enter_context(locked(output / LOCK, output))
            except CheckpointError:
                problem = (
                    f"{command}: another run is writing to `{output}`: wait until it ends, or give this one another "
                    "output folder"
                )
            except OSError as error:
                problem = f"{command}: `{output}` cannot be written ({error.strerror or error}): give another place"
        if arguments is not None and arguments.world_size > 1:
            from accelerate.utils import gather_object

            problem = next(filter(None, gather_object([problem])), None)
        if problem is not None:
            raise ConfigError(problem)
        yield
