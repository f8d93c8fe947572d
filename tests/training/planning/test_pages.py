"""Memory and hours on the recipes' pages are what `symphony plan` says."""

import re
from pathlib import Path

import pytest

from symphony_hf.recipe import load_recipe
from symphony_hf.training.planning.launches import read_launches
from symphony_hf.training.planning.plan import Machine, plan_recipe
from symphony_hf.training.planning.settings import read_settings

RECIPES = Path(__file__).parents[3] / "recipes"
SMALLEST = Machine(1)  # the largest micro-batch is not on the pages: nothing fits, and it is not looked for
PLANNED = sorted({path.parent.name for path in RECIPES.glob("*/smoke.yaml")})


def rows_of(folder):
    table = re.search(r"<!-- plan -->\n(.*?)<!-- end -->", (RECIPES / folder / "README.md").read_text(), re.S)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].strip().splitlines()[2:]]


def test_every_page_has_a_plan_of_its_recipe():
    for folder in PLANNED:
        files = [row[0] for row in rows_of(folder)]
        assert "config.yaml" in files
        assert all((RECIPES / folder / name).exists() for name in files)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("folder", PLANNED)
def test_the_pages_say_what_the_plan_says(folder):
    for name, launch, gpus, sequences, gpu, host, hours in rows_of(folder):
        recipe = load_recipe(RECIPES / folder / name)
        launches = read_launches(RECIPES / "accelerate" / f"{launch}.yaml")
        settings, of_run = read_settings(recipe), int(sequences.replace(",", ""))
        of_an_epoch = None if settings.max_steps > 0 else round(of_run / settings.epochs)
        (row,) = plan_recipe(recipe, launches, [int(gpus)], SMALLEST, of_an_epoch).rows
        assert f"{row.sequences:,}" == sequences
        # As printed, and what another version of a library may make of it.
        assert row.memory.gpu_total / 1e9 == pytest.approx(float(gpu), rel=0.03, abs=0.06)
        assert row.memory.host_total / 1e9 == pytest.approx(float(host), rel=0.03, abs=0.06)
        assert row.hours == pytest.approx(float(hours.replace(",", "")), rel=0.05, abs=0.006)
