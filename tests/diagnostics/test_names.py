"""Short names of models in pictures and tables."""

import pytest

from symphony_hf.diagnostics.labels import short_names


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["runs/a/step-10", "runs/a/step-20/"], ["step-10", "step-20"]),
        (["runs/a/model", "runs/b/model"], ["runs/a/model", "runs/b/model"]),
        ([r"C:\runs\graph", "org/plain"], ["graph", "plain"]),
        ([r"C:\a\model", r"C:\b\model"], [r"C:\a\model", r"C:\b\model"]),
        (["/", "runs/a"], ["/", "a"]),
    ],
)
def test_the_last_part_of_each_path_or_the_whole_where_that_is_the_same(sources, names):
    assert short_names(sources) == names
