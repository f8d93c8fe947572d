"""`python -m symphony_hf.train RECIPE.yaml`, also through `accelerate launch -m`: train a recipe."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .allocator import keep_freed_memory
from .errors import ConfigError, SymphonyError, one_line
from .recipe import load_recipe
from .settings import read_option

USAGE = """usage: python -m symphony_hf.train RECIPE.yaml [--NAME VALUE ...]

Train a recipe. NAME is a setting of the train section, named as in TrainingArguments, or SECTION.NAME.
With --dry_run, print the plan without loading or writing anything.

  python -m symphony_hf.train recipes/quickstart/config.yaml --dry_run
  python -m symphony_hf.train recipes/quickstart/config.yaml --max_steps 2 --symphony.strength 0
  python -m symphony_hf.train recipes/quickstart/config.yaml --save_strategy steps --save_steps 100
  python -m symphony_hf.train recipes/quickstart/config.yaml --save_strategy steps --resume_from_checkpoint true
  accelerate launch --num_processes 2 -m symphony_hf.train recipes/quickstart/config.yaml --launch.processes 2
"""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse `--name value` and `--name=value` pairs, with values in YAML. Dashes in a name are underscores.

    Raises:
        ConfigError: If a name has no value, an argument does not begin with `--`, or a value is not valid YAML, or ends
            in a comment.
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
        overrides[name.replace("-", "_")] = read_option(f"`--{name}`", value)
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word not in ("--dry_run", "--dry-run")]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    dry_run = words != given
    try:
        recipe = load_recipe(words[0], parse_overrides(words[1:]))
        # Only once the recipe is valid: these imports take seconds.
        from symphony_hf.training.launch import launch_command
        from symphony_hf.training.runner import prepare_dry_run, run_recipe

        command = shlex.join([*launch_command(), "-m", "symphony_hf.train", *words])

        if dry_run:
            from symphony_hf.training.report import print_dry_run

            print_dry_run(recipe, *prepare_dry_run(recipe))
            return 0
        results = run_recipe(recipe, command)
    except SymphonyError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{_summary(results['test'])}; report: {Path(recipe.output.directory) / 'report.md'}")
    return 0


def _summary(test: Mapping[str, Any]) -> str:
    """Return the results of the final evaluation in one line. Those of text are perplexities; see `measure`."""
    if not test:
        return "test: no held-out split"
    values = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in test.items()}
    if "clean" in test:
        shown = [f"{name} {values[name]}" for name in ("clean", "attacked", "ratio") if name in values]
        return f"test perplexity: {', '.join(shown)}"
    if "loss" in test:
        values["loss"] += " nats a token"
    return "test: " + ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
