"""Settings are converted to the types of their fields, and what already has one stays as it was given."""

import dataclasses
from typing import Any

import pytest

from symphony_hf import ConfigError
from symphony_hf.settings import parse_settings, read_option, read_yaml


@dataclasses.dataclass(kw_only=True)
class Example:
    """Settings of the kinds that recipes have."""

    path: str | None = None
    free: dict[str, Any] | None = None
    names: list[str] | None = None
    steps: int = 1
    rate: float = 0.1
    check: bool = False


def parse(**settings):
    return parse_settings(Example, settings, "here")


def test_quoted_text_is_not_read_as_yaml_again():
    free = {"a": "no", "b": "null", "c": "0123", "d": {"e": "1e3"}, "f": ["yes"]}
    assert parse(free=free).free == free
    assert parse(path="null").path == "null"
    assert parse(names=["null", "0123"]).names == ["null", "0123"]


def test_text_from_yaml_becomes_a_number():
    found = parse(steps="1e3", rate="1e-4")
    assert (found.steps, found.rate) == (1000, 1e-4)
    assert type(found.steps) is int
    assert parse(rate=1).rate == 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"free": "text"}, "`free` must be dict or null, got 'text'"),
        ({"steps": "abc"}, "`steps` must be int, got 'abc'"),
        ({"steps": 1.5}, "`steps` must be int, got 1.5"),
        ({"steps": None}, "`steps` must be int, got None"),
        ({"rate": "two"}, "`rate` must be float, got 'two'"),
    ],
)
def test_values_of_other_types_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=f"here: {problem}"):
        parse(**settings)


@pytest.mark.parametrize("text", ["1e-5", "1e6", "2.5e3", "-3E+2", ".5e1"])
def test_numbers_with_an_exponent_are_numbers(text):
    """YAML 1.1 reads those without a point, or without a sign, as text."""
    assert read_yaml(f"config: {{rope: {{theta: {text}}}}}", "here") == {"config": {"rope": {"theta": float(text)}}}
    assert read_yaml(f"'{text}'", "here") == text
    assert read_yaml("1e5f3", "here") == "1e5f3"


@pytest.mark.parametrize("text", ["2025-06-01", "2025-13-01", "2025-06-01 12:00:00"])
def test_dates_are_text(text):
    assert read_yaml(text, "here") == text


def test_an_impossible_value_is_refused():
    with pytest.raises(ConfigError, match="here is not valid YAML"):
        read_yaml("!!timestamp 2025-13-01", "here")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "`a` is given twice, on lines 1 and 3: keep one"),
        ("train:\n  seed: 1\n  bf16: true\n  'seed': 2\n", "`seed` is given twice, on lines 2 and 4"),
        ("{a: 1, a: 1}", "`a` is given twice, on lines 1 and 1"),
        ("x: [{a: 1}, {b: 1, b: 2}]", "`b` is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(text, problem):
    with pytest.raises(ConfigError, match=f"here is not valid YAML: {problem}"):
        read_yaml(text, "here")


@pytest.mark.parametrize("value", ["a: 1 # b", "- 1 # b", "a #1.txt", "[1] # b", "{a: 1} #", "a:\n  - 1 # b"])
def test_an_option_that_ends_in_a_comment_is_refused(value):
    with pytest.raises(ConfigError, match=r"(?s)`--name`: .*`#` begins a comment in YAML: quote the value once more"):
        read_option("`--name`", value)


@pytest.mark.parametrize("value", ["a#1.txt", "'a #1.txt'", "a: '#'", "- a#"])
def test_an_option_may_have_a_number_sign(value):
    assert read_option("`--name`", value) == read_yaml(value, "here")


def test_merged_keys_may_be_given_again():
    text = "one: &one {a: 1, b: 2}\ntwo: &two {<<: *one, b: 3}\nthree: {<<: *two, <<: *one, a: 4}\n"
    found = read_yaml(text, "here")
    assert (found["two"], found["three"]["a"]) == ({"a": 1, "b": 3}, 4)
