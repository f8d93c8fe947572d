"""`python -m symphony_hf.train RECIPE.yaml`, and through `accelerate launch -m`: train what a recipe says."""

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from .errors import ConfigError, SymphonyError
from .recipe import load_recipe

USAGE = """usage: python -m symphony_hf.train RECIPE.yaml [--NAME VALUE ...]

Train what a recipe says. NAME is a setting of the train section (TrainingArguments' own name), or SECTION.NAME.

  python -m symphony_hf.train recipes/quickstart/config.yaml
  python -m symphony_hf.train recipes/quickstart/config.yaml --max_steps 2 --symphony.strength 0
  python -m symphony_hf.train recipes/quickstart/config.yaml --save_strategy steps --save_steps 100
  python -m symphony_hf.train recipes/quickstart/config.yaml --save_strategy steps --resume_from_checkpoint true
  accelerate launch --num_processes 2 -m symphony_hf.train recipes/quickstart/config.yaml --launch.processes 2
"""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--name value` and `--name=value` pairs, values read as YAML.

    Raises:
        ConfigError: If a name has no value, or a word stands where a name should.
    """
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"expected `--NAME VALUE`, got `{word}`")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"`--{name}` has no value")
            value = words.pop(0)
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"`--{name}`: `{value}` is no YAML value") from error
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    try:
        recipe = load_recipe(words[0], parse_overrides(words[1:]))
        from .training.runner import run_recipe  # after the recipe was found to be sound: this import takes seconds

        results = run_recipe(recipe)
    except SymphonyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if "test" in results:
        test = results["test"]
        print(
            f"test perplexity {test['clean']:.2f} clean, {test['attacked']:.2f} attacked (x{test['ratio']:.3f}), "
            f"{test['documents']} documents; results in {recipe.output.directory}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
