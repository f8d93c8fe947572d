"""Options that more than one command has."""

from ..errors import ConfigError


def numbers(text: str, command: str, option: str) -> tuple[int, ...]:
    """The numbers of an option that takes them with commas between.

    Raises:
        ConfigError: If it has something else.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"symphony {command}: --{option} takes numbers with commas between them, got {text!r}"
        ) from error
