"""Sequences that fit the model, said before its weights are loaded."""

from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..recipe import DataSection


def check_lengths(section: "DataSection", config: "PretrainedConfig") -> None:
    """Refuse sequences that are longer than the model has positions for.

    Args:
        section: Its `block_size` is the longest sequence of every kind of data.
        config: Of the model; for one with images, its text model's counts. A config that names no limit has none.

    Raises:
        DataError: If they are longer.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and section.block_size > most:
        raise DataError(
            f"data.block_size: {section.block_size:,} tokens are more than {config.model_type} has positions for "
            f"(max_position_embeddings {most:,}): set it to {most:,} at most"
        )
