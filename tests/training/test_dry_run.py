"""`--dry_run` resolves a recipe, even if its weights, data and GPUs are not available, and writes nothing."""

from pathlib import Path

import datasets
import pytest
import transformers
from typer.testing import CliRunner

from symphony_hf.cli import app
from symphony_hf.recipe import load_recipe
from symphony_hf.train import main as train_main

RECIPES = Path(__file__).parents[2] / "recipes"
ON_A_CPU = ["--use_cpu", "true", "--bf16", "false", "--optim", "adamw_torch"]
ON_A_CPU += ["--launch.strategy", "null", "--model.quantization", "null"]
NAMES = ["quickstart/config", "phi3-smoe-7.4b-glue/lora", "olmoe-7b-sft/full", "llava-smoe-4.2b/config"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working directory, without access to weights or data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))

    def touch(*args, **kwargs):
        raise AssertionError("a dry run reads neither weights nor data")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", touch)
    monkeypatch.setattr(datasets, "load_dataset", touch)
    monkeypatch.setattr(datasets, "load_dataset_builder", touch)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_touches_nothing(name, empty, capsys):
    assert train_main([str(RECIPES / f"{name}.yaml"), *ON_A_CPU, "--max_steps", "7", "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("1, single", "7 steps", "This was a dry run: nothing was loaded, trained or written."):
        assert word in out
    assert list(empty.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.parametrize("name", [str(path.relative_to(RECIPES)) for path in sorted(RECIPES.glob("*/*.yaml"))])
def test_every_recipe_prints_its_plan_on_a_laptop(name, empty, monkeypatch, capsys):
    """Without a GPU, a network, and the packages that only its training needs."""
    if name.startswith("accelerate/"):
        pytest.skip("a launch, not a recipe")
    monkeypatch.setattr("symphony_hf.training.arguments._is_installed", lambda package: False)
    assert train_main([str(RECIPES / name), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "This was a dry run: nothing was loaded, trained or written." in out
    listed = " ".join(" ".join(out.split("Not checked: ")[1:]).split())  # long lines are wrapped
    recipe = load_recipe(RECIPES / name, {})
    assert ("whether the run fits on a GPU, and its precision there (no GPU here)" in listed) == (
        not recipe.train.get("use_cpu")
    )
    assert ("needs bitsandbytes" in listed) == (recipe.model.quantization is not None)
    assert ("strategy zero3" in listed) == (recipe.launch.strategy == "zero3")
    assert ("needs trl" in listed) == (recipe.data.kind == "chat")
    assert list(empty.iterdir()) == []


def test_what_is_wrong_with_a_recipe_is_said_in_one_line(empty, capsys):
    (empty / "bad.yaml").write_text("model: {config: [")
    assert train_main(["bad.yaml", "--dry_run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "is not valid YAML" in lines[0]


def test_a_dry_run_needs_a_recipe(empty, capsys):
    assert train_main(["--dry_run"]) == 2
    assert "usage:" in capsys.readouterr().out


def test_what_is_wrong_anywhere_is_refused_in_a_dry_run(empty, capsys):
    words = [str(RECIPES / "mixtral-8x7b-qlora" / "config.yaml"), "--launch.strategy", "zero3", "--dry_run"]
    assert train_main(words) == 1
    assert "4-bit weights cannot be partitioned" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config", "stock"])
def test_adapters_that_the_run_would_refuse_are_refused_in_a_dry_run(name, empty, capsys):
    words = [str(RECIPES / "olmoe-7b-sft" / f"{name}.yaml"), "--peft.experts", "true", "--peft.dropout", "0.1"]
    assert train_main([*words, *ON_A_CPU, "--dry_run"]) == 1
    assert "give dropout=0" in capsys.readouterr().err


def test_damage_is_checked_and_described_in_a_dry_run(empty, capsys):
    recipe, damage = str(RECIPES / "quickstart/config.yaml"), "{attack: keyboard, rate: 0.1}"
    assert train_main([recipe, "--dry_run", "--data.damage", damage]) == 0
    assert "training input damaged anew in each epoch" in " ".join(capsys.readouterr().out.split())
    workers = ["--dataloader_persistent_workers", "true", "--dataloader_num_workers", "1"]
    for words, message in (
        (["--data.damage", "{attack: keybord, rate: 0.1}"], "did you mean `keyboard`"),
        (["--data.damage", damage, "--data.streaming", "true"], "only `text` without `streaming` can be damaged"),
        (["--data.damage", damage, *workers], "would repeat its damage in every epoch"),
    ):
        assert train_main([recipe, "--dry_run", *words]) == 1
        assert message in capsys.readouterr().err


def test_packed_text_and_flash_attention_in_batches_are_refused_in_a_dry_run(empty, capsys):
    words = [str(RECIPES / "quickstart/config.yaml"), "--dry_run", "--data.packing", "true"]
    flash = ["--model.attention", "flash_attention_2"]
    one = ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1"]
    assert train_main([*words, *flash]) == 1
    assert "keeps documents apart only in batches of one row" in capsys.readouterr().err
    train_main([*words, *flash, *one])
    assert "in batches of one row" not in capsys.readouterr().err


def test_symphony_train_is_the_same_without_accelerate(empty):
    words = [str(RECIPES / "quickstart" / "config.yaml"), "--symphony.strength", "0", "--dry_run"]
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 0, result.output
    assert "strength=0" in result.output
    assert list(empty.iterdir()) == []


def test_dashes_in_the_name_of_a_setting_are_underscores(empty):
    words = ["train", str(RECIPES / "quickstart" / "config.yaml"), "--max-steps", "7", "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "7 steps" in result.output
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ("", "text: embedded text data, block_size: 128, a tokenizer trained on it (bpe, at most 2,048 tokens)"),
        ("{kind: chat, path: me/chats}", "chat: me/chats, a tokenizer trained on it (bpe, at most 4,096 tokens)"),
        ("{kind: glue, name: rte}", "glue: GLUE rte, name: rte, a tokenizer"),
        ("{path: me/data, vocab_size: 999}", "text: me/data, the tokenizer of `model.path`"),
    ],
)
def test_the_data_and_its_source_are_always_shown(settings, described, empty, capsys):
    recipe = empty / "recipe.yaml"
    recipe.write_text(f"base: {RECIPES / 'quickstart' / 'config.yaml'}\n")
    if settings:
        path = ", path: me/model, dtype: float32" if "model.path" in described else ""
        model = f"{{config: {{model_type: olmoe, num_hidden_layers: 1}}{path}}}"
        recipe.write_text(f"model: {model}\ndata: {settings}\n")
    assert train_main([str(recipe), "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert described in shown


def test_symphony_train_trains(monkeypatch):
    """The recipe with its overrides; the command that the report names is the one without the launcher."""
    given, results = [], {"test": {"clean": 2.5, "attacked": 3.0, "ratio": 1.2, "documents": 3}}

    def run_recipe(recipe, command):
        given.extend((recipe, command))
        return results

    monkeypatch.setattr("symphony_hf.training.runner.run_recipe", run_recipe)
    smoke = RECIPES / "phi3-smoe-7.4b-glue" / "smoke.yaml"
    words = ["train", str(smoke), "--max_steps", "7", "--output.directory", "a run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert given == [
        load_recipe(smoke, {"max_steps": 7, "output.directory": "a run"}),
        f"python -m symphony_hf.train {smoke} --max_steps 7 --output.directory 'a run'",
    ]
    measured = "test perplexity: clean 2.5000, attacked 3.0000, ratio 1.2000; report: a run/report.md"
    assert measured in result.output
    results["test"] = {"split": "validation", "loss": 0.5, "perplexity": 1.6487}
    expected = "test: split validation, loss 0.5000 nats a token, perplexity 1.6487; report: a run/report.md"
    assert expected in CliRunner().invoke(app, words).output
    results["test"] = {}
    assert "test: no held-out split; report: a run/report.md" in CliRunner().invoke(app, words).output


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--learning_rat", "1"], "did you mean `learning_rate`"),
        (["--symphony.strenght", "0"], "did you mean `strength`"),
        (["--symphny.strength", "0"], "did you mean `symphony`"),
        (["--model.config", "{model_type: olmo_e}"], "olmo_e"),
    ],
)
def test_unknown_names_are_refused_in_a_dry_run_too(words, nearest, empty, capsys):
    assert train_main([str(RECIPES / "quickstart" / "config.yaml"), *words, "--dry_run"]) == 1
    assert nearest in capsys.readouterr().err
    assert list(empty.iterdir()) == []
