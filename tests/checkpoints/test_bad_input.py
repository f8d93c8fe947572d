"""Bad input gets a SymphonyError that says what, where and what to do, before anything has changed."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from models import COMMON, make_llava, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig, OlmoeConfig, OlmoeForCausalLM

from symphony_hf import (
    ConfigError,
    GraphError,
    PatchError,
    SymphonyConfig,
    SymphonyError,
    SymphonyWarning,
    UnsupportedModelError,
    add_router_losses,
    expert_graphs,
    is_symphonized,
    symphonize,
    update_graphs,
)
from symphony_hf.checkpoints.graph_files import SUFFIX
from symphony_hf.checkpoints.model_class import read_config
from symphony_hf.checkpoints.untrusted import load_checkpoint
from symphony_hf.errors import CheckpointError
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.experiments.fuzzing.campaign import MemoryPeak
from symphony_hf.recipe import load_recipe
from symphony_hf.train import main as train_main
from symphony_hf.train import parse_overrides


def assert_untouched(model, call, error, message):
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, SymphonyError)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types


def test_a_dense_model():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    assert_untouched(model, lambda: symphonize(model), UnsupportedModelError, r"llama: no router found.*supports tran")


def test_an_unsupported_family():
    model = AutoModelForCausalLM.from_config(DogeConfig(**COMMON, is_moe=True, num_experts=16, num_experts_per_tok=2))
    assert_untouched(model, lambda: symphonize(model), UnsupportedModelError, "router")


def test_a_model_already_symphonized():
    model = symphonize(make_model())
    assert_untouched(model, lambda: symphonize(model), PatchError, "already symphonized")


def test_a_model_wrapped_by_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    assert_untouched(model, lambda: symphonize(model), PatchError, "wrapped by PEFT.*modules_to_save")
    inner = model.base_model.model
    assert_untouched(inner, lambda: symphonize(inner), PatchError, "wrapped by PEFT")


def test_a_compiled_model_and_other_wrappers():
    model = make_model()
    compiled = torch.compile(model)
    assert_untouched(model, lambda: symphonize(compiled), PatchError, "before wrapping or compiling")
    wrapper = torch.nn.Sequential(model)
    assert_untouched(wrapper, lambda: symphonize(wrapper), PatchError, "got Sequential")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strenght": 1}, "unknown setting `strenght`; did you mean `strength`"),
        ({"strength": 1.5}, "`strength` must be between -1 and 1, got 1.5"),
        ({"strength": -0.5, "smoothing": "scores"}, "`scores` needs a strength from 0 on, got -0.5"),
        ({"normalization": "centred", "self_loops": False}, "`centred` needs `self_loops`"),
        ({"strength": float("nan")}, "must be a number"),
        ({"strength": True}, "must be a number"),
        ({"decay": -0.1}, "`decay` must be between 0 and 1"),
        ({"decay": "fast"}, "`decay` must be a number, got 'fast'"),
        ({"smoothing": "logit"}, "did you mean `logits`"),
        ({"normalization": "rows"}, "did you mean `row`"),
        ({"smoothing": "scores", "normalization": "symmetric"}, "needs normalization `row`"),
        ({"graph": "learned", "self_loops": False}, "needs `self_loops`"),
        ({"self_loops": "no"}, "true or false"),
        ({"warmup_steps": 1.5}, "whole number"),
        ({"warmup_steps": -1}, "between 0"),
        ({"layers": "all"}, "list of layer numbers"),
        ({"layers": ()}, "list of layer numbers"),
        ({"layers": (0, -1)}, "list of layer numbers"),
        ({"layers": 3}, "list of layer numbers.*got 3"),
        ({"layers": {1: 2}}, "list of layer numbers"),
        ({"layers": [True]}, "list of layer numbers"),
        ({"graph": ""}, "ema, frozen, learned or a path"),
        ({"balance_loss_weight": -1}, "balance_loss_weight"),
    ],
)
def test_settings(settings, message):
    model = make_model()
    assert_untouched(model, lambda: symphonize(model, **settings), ConfigError, message)


def test_layers_without_a_router():
    model = make_model()
    assert_untouched(model, lambda: symphonize(model, layers=[7]), UnsupportedModelError, "layer 7 of `layers` has no")


def test_a_graph_path_that_is_not_there(tmp_path):
    model = make_model()
    missing = str(tmp_path / "missing")
    assert_untouched(model, lambda: symphonize(model, graph=missing), SymphonyError, "does not exist")


def test_experts_that_read_the_routers_weight_themselves(monkeypatch):
    """As MXFP4 gpt-oss does, and kernels of the Hub: any patch would be passed by."""
    model = make_model()
    model.config.quantization_config = {"quant_method": "mxfp4"}
    assert_untouched(model, lambda: symphonize(model), PatchError, "MXFP4")
    model = make_model()
    monkeypatch.setattr(type(model), "use_kernels", True)
    assert_untouched(model, lambda: symphonize(model), PatchError, "use_kernels=False")


def test_a_frozen_graph_that_was_never_learned():
    with pytest.warns(SymphonyWarning, match="never learned"):
        symphonize(make_model(), graph="frozen")


def test_calls_that_need_a_symphony_model():
    model = make_model()
    for call in (expert_graphs, update_graphs, lambda m: add_router_losses(m, torch.tensor(1.0))):
        with pytest.raises(PatchError, match="call `symphonize"):
            call(model)


def router_forward(monkeypatch, model, forward):
    """Give Mixtral's router another forward for one test: what a new release may bring."""
    router_class = type(model.model.layers[0].mlp.gate)
    original = router_class.forward
    monkeypatch.setattr(router_class, "forward", lambda self, *args: forward(self, original, *args))


def test_a_family_whose_router_moved_is_refused(monkeypatch):
    """A router that does something else with its weight than we understand must never be routed wrongly."""

    def cosine(self, original, hidden_states):  # a unit-norm weight: smoothing it does not smooth the logits
        logits = F.linear(hidden_states, F.normalize(self.weight, dim=-1))
        return logits, *logits.softmax(-1).topk(self.top_k)

    def picky(self, original, hidden_states):
        logits, weights, indices = original(self, hidden_states)
        return (logits if isinstance(self, torch.nn.Module) else 2 * logits), weights, indices

    for forward, message in ((cosine, "not the smoothed ones"), (picky, "differs from the original")):
        model = make_model("mixtral")
        with monkeypatch.context() as patch:
            router_forward(patch, model, forward)
            assert_untouched(model, lambda model=model: symphonize(model), UnsupportedModelError, message)


def test_a_router_of_an_unknown_contract_is_refused(monkeypatch):
    for forward, message in (
        (lambda self, original, x: original(self, 2 * x)[1:2], "logits of shape .* were expected"),
        (lambda self, original, x: original(self, x)[:2], "no integers of shape .* say which experts"),
        (lambda self, original, x, mask: original(self, x), "did not run on hidden states of shape"),
        (lambda self, original, x: (x, x, x), "does not multiply by its weight"),
    ):
        model = make_model("mixtral")
        with monkeypatch.context() as patch:
            router_forward(patch, model, forward)
            assert_untouched(model, lambda model=model: symphonize(model), UnsupportedModelError, message)


def test_scores_need_a_softmax_or_sigmoid_head(monkeypatch):
    def softplus_head(self, original, hidden_states):
        logits, _, indices = original(self, hidden_states)
        return logits, F.softplus(logits).gather(1, indices), indices

    model = make_model("mixtral")
    router_forward(monkeypatch, model, softplus_head)
    assert_untouched(
        model, lambda: symphonize(model, smoothing="scores"), UnsupportedModelError, "neither a softmax nor a sigmoid"
    )
    assert is_symphonized(symphonize(model))


def test_config_round_trip_and_format():
    config = SymphonyConfig(strength=0.5, layers=(3, 1, 1))
    assert config.layers == (1, 3)
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["format"] == 2
    assert SymphonyConfig.from_dict(stored) == config
    with pytest.raises(ConfigError, match="format 9"):
        SymphonyConfig.from_dict({**stored, "format": 9})
    with pytest.raises(ConfigError, match="expected settings by name"):
        SymphonyConfig.from_dict(["strength"])
    for graph in ("ema", "frozen", "learned"):
        assert SymphonyConfig.from_stored({"graph": graph}).graph == graph


@pytest.mark.parametrize(
    ("graph", "message"), [("/nowhere", "known names: ema, frozen, learned"), ("emma", "did you mean `ema`")]
)
def test_a_config_cannot_have_a_path_for_its_graphs(graph, message):
    """The path would not be read: the graphs would be the identity for ever."""
    config = make_model().config
    config.symphony = SymphonyConfig(graph=graph).to_dict()
    with pytest.raises(ConfigError, match=f"config.json: symphony: `graph` is '{graph}'; {message}.*symphonize"):
        AutoModelForCausalLM.from_config(config)


# Recipes.

GOOD = "model: {config: {model_type: olmoe}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections by name"),
        ("model: [", "is not valid YAML"),
        ("modle: {}\n" + GOOD, "unknown section `modle`; did you mean `model`"),
        ("symphony: {}\n", "`model` is missing"),
        ("model: {}\n", "got neither"),
        ("model: {config: {hidden_size: 3}}\n", "needs a `model_type`"),
        ("model: {path: x, dtype: float31}\n", "did you mean `float32`"),
        (GOOD + "data: {blocksize: 3}\n", "unknown setting `blocksize`; did you mean `block_size`"),
        (GOOD + "data: {block_size: 1}\n", "at least 2, got 1"),
        (GOOD + "symphony: {strength: 2}\n", "`strength` must be between"),
        (GOOD + "symphony: 3\n", "expected settings by name"),
        (GOOD + "symphony: 0\n", "symphony: expected settings by name, got 0"),
        (GOOD + "symphony: ''\n", "symphony: expected settings by name, got ''"),
        (GOOD + "peft: []\n", r"peft: expected settings by name, got \[\]"),
        (GOOD + "eval: false\n", "eval: expected settings by name, got False"),
        (GOOD + "train: no\n", "train: expected settings by name, got False"),
        (GOOD + "learning_rate: 1\n", "unknown section `learning_rate`"),
        (GOOD + "peft: {alpha: 0}\n", "`alpha` must be at least 1, got 0"),
        (GOOD + "peft: {alpha: -5}\n", "`alpha` must be at least 1, got -5"),
        (GOOD + "train: {seed: 1}\ntrain: {bf16: true}\n", "`train` is given twice, on lines 2 and 3"),
        (GOOD + "data: {rows: lines}\n", "`rows: lines` needs `kind: text` with a `path`, and no `streaming`"),
        (GOOD + "train: [1]\n", "expected settings by name"),
        (GOOD + "eval: {attack_rate: abc}\n", "`attack_rate` must be float, got 'abc'"),
        (GOOD + "eval: {documents: 0}\n", "`documents` must be at least 1"),
        (GOOD + "eval: {seed: -1}\n", "`seed` must be"),
    ],
)
def test_recipes(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_recipe_overrides_and_null(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + "symphony: {strength: 0.5}\ntrain: {max_steps: 9}\n")
    recipe = load_recipe(path, parse_overrides(["--max_steps", "2", "--symphony.strength=0", "--seed", "3"]))
    assert recipe.train == {"max_steps": 2, "seed": 3}
    assert recipe.symphony.strength == 0
    path.write_text(GOOD + "symphony:\n")
    assert load_recipe(path).symphony is None
    below = tmp_path / "smoke.yaml"
    below.write_text("base: recipe.yaml\nsymphony: {decay: 0.9}\npeft:\ntrain: {seed: 1}\n")
    path.write_text(GOOD + "symphony: {strength: 0.5}\npeft: {r: 4}\ntrain: {max_steps: 9}\n")
    recipe = load_recipe(below, {"symphony.strength": "1e-1"})
    assert (recipe.symphony.strength, recipe.symphony.decay, recipe.peft) == (0.1, 0.9, None)
    assert recipe.train == {"max_steps": 9, "seed": 1}
    path.write_text("base: smoke.yaml\n")
    with pytest.raises(ConfigError, match="its own `base`"):
        load_recipe(below)
    path.write_text(GOOD + "train: 3\n")
    with pytest.raises(ConfigError, match="train: expected settings by name, got 3"):
        load_recipe(path, {"max_steps": 2})
    for words, message in (
        (["max_steps", "2"], "expected `--NAME VALUE`"),
        (["--max_steps"], "has no value"),
        (["--max_steps", "[1"], "is not valid YAML"),
        (["--data.path", ""], "`--data.path` has no value: give one, or write null"),  # "$UNSET" in a shell
        (["--data.path= "], "`--data.path` has no value: give one, or write null"),
        (["--data.path", "my #1.txt"], "`--data.path`: `my #1.txt`: `#` begins a comment"),
        (["--data.path", "#1.txt"], "`#` begins a comment"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_overrides(words)


def test_values_and_names_of_options_are_taken_as_they_are_written():
    words = ["--max-steps", "2", "--data.block-size=8", "--data.path", "a#1-b.txt", "--data.name", '"my #1.txt"']
    found = parse_overrides([*words, "--data.revision", "null", "--output.directory", "my-run"])
    assert found == {
        "max_steps": 2,
        "data.block_size": 8,
        "data.path": "a#1-b.txt",
        "data.name": "my #1.txt",
        "data.revision": None,
        "output.directory": "my-run",
    }


def test_false_is_none_for_a_section_that_a_recipe_may_do_without(tmp_path):
    path, below = tmp_path / "recipe.yaml", tmp_path / "below.yaml"
    path.write_text(GOOD + "symphony: false\npeft: no\n")
    assert (load_recipe(path).symphony, load_recipe(path).peft) == (None, None)
    below.write_text("base: recipe.yaml\nsymphony: {strength: 0.5}\n")
    assert load_recipe(below).symphony.strength == 0.5
    assert load_recipe(path, {"peft.r": 4}).peft.r == 4
    path.write_text(GOOD + "symphony: {strength: 0.5}\npeft: {r: 4}\n")
    below.write_text("base: recipe.yaml\nsymphony: false\npeft: false\n")
    assert (load_recipe(below).symphony, load_recipe(below).peft) == (None, None)


def test_a_tilde_is_the_home_folder_in_every_local_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {path: ~/m, tokenizer: ~/t, vision: ~/v}\nsymphony: {graph: ~/g}\n"
        "train: {resume_from_checkpoint: ~/c}\noutput: {directory: ~/runs/a}\ndata: {path: ~/d}\n"
    )
    recipe = load_recipe(path)
    model = (recipe.model.path, recipe.model.tokenizer, recipe.model.vision)
    assert model == ("/home/me/m", "/home/me/t", "/home/me/v")
    assert (recipe.symphony.graph, recipe.output.directory) == ("/home/me/g", "/home/me/runs/a")
    assert recipe.train == {"resume_from_checkpoint": "/home/me/c"}
    assert recipe.data.path == "~/d"  # which checkpoints record; it is expanded where the data is read
    assert load_recipe(path, {"output.directory": "~/b"}).output.directory == "/home/me/b"
    assert load_recipe(path, {"output.directory": "b~"}).output.directory == "b~"


def test_the_command_says_errors_in_one_line(tmp_path, capsys):
    assert train_main([str(tmp_path / "none.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + "train: {max_step: 1}\n")
    assert train_main([str(path)]) == 1
    assert "did you mean `max_steps`" in capsys.readouterr().err
    assert train_main([]) == 2
    assert train_main(["--help"]) == 0
    assert "accelerate launch" in capsys.readouterr().out


def test_weights_that_the_config_names_are_refused(tmp_path):
    """Transformers loads them in place of the files that are checked."""
    symphonize(make_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"transformers_weights": "x.safetensors.index.json"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers_weights"):
        load_checkpoint(tmp_path)


def test_experts_of_a_nested_config_that_are_not_there_are_not_allocated(tmp_path):
    symphonize(make_llava()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"num_experts": 2**12, "symphony": config["symphony"]}  # a graph of 64 MiB
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its config asks for"), MemoryPeak() as memory:
        load_checkpoint(tmp_path)
    assert memory.taken < 2**25 or sys.platform != "linux"


@pytest.mark.parametrize(
    ("settings", "graph"),
    [
        ({}, None),
        ({}, torch.eye(4)),
        ({"graph": "learned"}, None),
        ({"routers": ["lm_head"], "top_k": 2}, None),
    ],
)
def test_graphs_that_are_not_there_are_not_allocated(settings, graph, tmp_path):
    """They grow with the square of the number of experts, and no other weight does."""
    sizes = dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"), 2)
    config = OlmoeConfig(**sizes, vocab_size=4096, num_hidden_layers=1, num_experts=4096, eos_token_id=1)
    OlmoeForCausalLM(config).save_pretrained(tmp_path, save_original_format=False)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"symphony": {"format": 2, **settings}}))
    if graph is not None:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[f"model.layers.0.mlp.gate{SUFFIX}"] = graph
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(SymphonyError, match=r"asks for (a graph or a tensor of|graphs with) 16,777,216"),
        MemoryPeak() as memory,
    ):
        load_checkpoint(tmp_path)
    assert memory.taken < 2**25 or sys.platform != "linux"  # half of one graph


def test_a_graph_that_is_missing_is_counted(tmp_path):
    symphonize(make_model()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.gate{SUFFIX}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraphError, match=r"asks for graphs with 192 numbers in all, and the files have 128"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("switch_transformers", lambda config: config.update(num_experts=10**5)),
        ("qwen3_vl_moe", lambda config: config["vision_config"].update(depth=10**5)),
        ("olmoe", lambda config: config.update(num_hidden_layers=10**5)),
    ],
)
def test_modules_that_no_file_could_fill_are_refused_before_they_are_built(family, change, tmp_path):
    """Also on the meta device, 100,000 of them would take minutes to build."""
    tiny_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"asks for far more modules than the \d+ tensors of the files can fill"):
        load_checkpoint(tmp_path)


def test_a_large_number_that_is_no_number_of_modules_is_taken(tmp_path):
    """A window may begin at a layer that a shallow model does not have."""
    symphonize(make_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_window_layers": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(load_checkpoint(tmp_path).model.layers) == 3


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"rope_parameters": 3}])
def test_a_config_that_transformers_refuses(values, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no config of a model that transformers knows"):
        read_config(tmp_path)
