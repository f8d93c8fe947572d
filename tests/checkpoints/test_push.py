"""Pushed to a Hub on the loopback, by the API that huggingface_hub speaks, and loaded back from it."""

import json
import logging
import os
import shutil
import subprocess
import sys
import traceback

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Cut
from huggingface_hub import CommitOperationAdd, HfApi, constants
from models import assert_folded, make_ids, make_model, move_graphs
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from symphony_hf import (
    ConfigError,
    FoldError,
    PushError,
    is_symphonized,
    load_checkpoint,
    lora_config,
    push,
    symphonize,
    unsymphonize,
)
from symphony_hf.models.wikitext.configuration import WikiTextMoeConfig
from symphony_hf.models.wikitext.modeling import WikiTextMoeForCausalLM

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's, about its LFS upload
]


def load(repo_id="me/it", **settings):
    return AutoModelForCausalLM.from_pretrained(repo_id, **settings)


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub waits longer from retry to retry."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_a_checkpoint_comes_back_with_its_graphs_to_the_bit(hub, model, checkpoint):
    commit = push(checkpoint, "me/it")
    assert commit.commit_url == f"{hub.endpoint}/me/it/commit/{commit.oid}"
    assert set(hub.files("me/it")) == {
        *(".gitattributes", "README.md", "graphs.png"),
        *("config.json", "generation_config.json", "model.safetensors"),
    }
    assert hub.commits("me/it") == 2  # the repository's own, and one
    assert hub.files("me/it")["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    loaded, ids = load(), make_ids()
    assert is_symphonized(loaded)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_pushes_itself_marked_and_with_its_card(hub, model, tmp_path):
    model.push_to_hub("me/it", tags=["mine"], license="mit", commit_message="First")
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/other")
    model.model.push_to_hub("me/body")
    for repo_id, name in (("me/it", "ForCausalLM"), ("me/other", "ForCausalLM"), ("me/body", "Model")):
        config = json.loads(hub.files(repo_id)["config.json"])
        assert config["architectures"] == [f"SymphonyMixtral{name}"]
        assert "symphony-smoe" in hub.files(repo_id)["README.md"].decode()
    card = huggingface_hub.ModelCard(hub.files("me/it")["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.tags == ["symphony-smoe", "moe", "arxiv:2510.16411", "mine"]
    ids = make_ids()
    assert torch.equal(load()(ids).logits, model(ids).logits)
    unsymphonize(model)
    assert "push_to_hub" not in vars(model)
    assert "push_to_hub" not in vars(model.model)


def test_weights_of_the_users_own_are_pushed_as_they_are_saved(hub, model, tmp_path):
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average["model.norm.weight"].fill_(7.0)
    model.save_pretrained(tmp_path, state_dict=average, push_to_hub=True, repo_id="me/it")
    for loaded in (load(), load_checkpoint(tmp_path)):
        assert loaded.model.norm.weight.unique().tolist() == [7.0]


def test_a_variant_is_refused_before_anything_is_saved(hub, model, tmp_path):
    with pytest.raises(PushError, match="`variant` is 'fp16'"):
        model.push_to_hub("me/it", variant="fp16")
    with pytest.raises(PushError, match="`variant` is 'fp16'"):
        model.save_pretrained(tmp_path / "saved", variant="fp16", push_to_hub=True, repo_id="me/it")
    assert not (tmp_path / "saved").exists()
    assert not hub.repos
    model.save_pretrained(tmp_path / "saved", variant="fp16")
    assert (tmp_path / "saved" / "model.fp16.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_temp_dir": True}, PushError, "unknown setting `use_temp_dir`; known names: .*max_shard_size"),
        ({"comit_message": "x"}, PushError, "unknown setting `comit_message`; did you mean `commit_message`"),
        ({"max_shard_size": "5XB"}, ConfigError, "push: `max_shard_size` must be a number of bytes"),
        ({"base_model": "/home/base"}, PushError, "must be a `namespace/name` of the Hub"),
    ],
)
def test_settings_that_a_push_has_not_are_refused_before_anything_is_saved(
    settings, error, message, hub, model, monkeypatch
):
    monkeypatch.setattr(model, "save_pretrained", lambda *args, **kwargs: pytest.fail("it was saved"))
    with pytest.raises(error, match=message):
        model.push_to_hub("me/it", **settings)
    assert hub.requests == []


def test_a_setting_that_is_none_is_the_default(hub, model):
    model.push_to_hub("me/it", variant=None, max_shard_size=None, use_temp_dir=None, private=None)
    assert "model.safetensors" in hub.files("me/it")


def test_folded_it_leaves_out_other_weights_and_nothing_else(hub, checkpoint, caplog):
    (checkpoint / "model_notes.md").write_text("Mine.")
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "consolidated.safetensors")
    push(checkpoint, "me/it", folded=True)
    files = hub.files("me/it")
    assert files["model_notes.md"] == b"Mine."
    assert "consolidated.safetensors" not in files
    assert "left out: consolidated.safetensors (not folded)" in caplog.text


def test_folded_it_is_a_plain_checkpoint_with_the_same_logits(hub, model, checkpoint):
    (checkpoint / "tokenizer_config.json").write_text("{}")
    push(checkpoint, "me/it", folded=True)
    files = hub.files("me/it")
    assert json.loads(files["config.json"])["architectures"] == ["MixtralForCausalLM"]
    assert "symphony" not in json.loads(files["config.json"])
    assert {"tokenizer_config.json", "graphs.png"} < set(files)
    loaded, ids = load(), make_ids()
    assert not is_symphonized(loaded)
    assert_folded(loaded(ids).logits, model(ids).logits)


def test_the_packages_own_model_is_folded_too_and_its_card_says_what_it_needs(hub, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    config = WikiTextMoeConfig(**sizes, num_attention_heads=2, attention_span=6, num_experts=4)
    model = move_graphs(symphonize(WikiTextMoeForCausalLM(config))).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(11)[None]
    assert torch.equal(load_checkpoint(tmp_path)(ids).logits, model(ids).logits)
    push(tmp_path, "me/it", folded=True)
    loaded = load()
    assert not is_symphonized(loaded)
    assert_folded(loaded(ids).logits, model(ids).logits)
    card = hub.files("me/it")["README.md"].decode()
    assert "import symphony_hf  # brings the experts back" in card
    assert "Nothing else is needed" not in card


def test_what_cannot_be_folded_is_refused_before_the_hub_is_asked(hub, tmp_path):
    symphonize(make_model(), smoothing="scores").save_pretrained(tmp_path / "scores")
    with pytest.raises(FoldError, match="only smoothing=`logits` folds"):
        push(tmp_path / "scores", "me/it", folded=True)
    make_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(PushError, match="nothing to fold"):
        push(tmp_path / "plain", "me/it", folded=True)
    config = json.loads((tmp_path / "scores" / "config.json").read_text())
    (tmp_path / "scores" / "config.json").write_text(json.dumps({**config, "architectures": ["SymphonyNoneSuch"]}))
    with pytest.raises(PushError, match="no model class NoneSuch"):
        push(tmp_path / "scores", "me/it", folded=True)
    assert hub.requests == []


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, model, tmp_path):
    """transformers prefers `model.safetensors` to shards: the old one would be loaded."""
    other = symphonize(make_model("mixtral", seed=1))
    other.save_pretrained(tmp_path / "other")
    push(tmp_path / "other", "me/it")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    push(tmp_path / "sharded", "me/it")
    assert "model.safetensors" not in hub.files("me/it")
    assert hub.commits("me/it") == 3
    ids = make_ids()
    assert torch.equal(load()(ids).logits, model(ids).logits)
    push(tmp_path / "other", "me/it")
    assert [name for name in hub.files("me/it") if name.endswith("safetensors")] == ["model.safetensors"]
    assert torch.equal(load()(ids).logits, other(ids).logits)


def test_files_of_others_stay_in_the_repository(hub, model, checkpoint, tmp_path):
    """Also such as look like shards: the index names the model's own."""
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    push(tmp_path / "sharded", "me/it")
    others = {"model-00009-of-00099.safetensors": b"", "model-ema.safetensors": b"", "notes.txt": b"precious"}
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_commit("me/it", [CommitOperationAdd(name, data) for name, data in others.items()], commit_message="more")
    push(checkpoint, "me/it")
    assert others.keys() <= set(hub.files("me/it"))
    assert "model-00001-of-" not in "".join(sorted(hub.files("me/it")))


def test_a_model_in_place_of_an_adapter_is_what_is_loaded(hub, model, tmp_path):
    adapted = get_peft_model(model, lora_config(model))
    adapted.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "me/it")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    push(tmp_path / "merged", "me/it")
    assert not any(name.startswith("adapter") for name in hub.files("me/it"))
    assert is_symphonized(load())


def test_a_push_of_what_is_there_already_sends_nothing(hub, checkpoint):
    first = push(checkpoint, "me/it")
    sent = len(hub.received)
    assert push(checkpoint, "me/it").oid == first.oid
    assert len(hub.received) == sent
    assert hub.commits("me/it") == 2


# Connections that break.


def test_a_part_that_is_cut_is_sent_again_and_no_other(hub, model, checkpoint, no_waiting):
    hub.parts_of = 60_000
    size = (checkpoint / "model.safetensors").stat().st_size
    hub.cuts.append(Cut("PUT", "/lfs/[0-9a-f]+/2$", after=20_000))
    push(checkpoint, "me/it")
    parts = [(part, sent) for _, part, sent in hub.received if part]
    assert [part for part, _ in parts] == list(range(1, -(-size // 60_000) + 1))
    assert sum(sent for _, sent in parts) == size
    assert hub.cuts[0].times == 0
    puts = [path for method, path in hub.requests if method == "PUT" and path.endswith("/2")]
    assert len(puts) == 2
    ids = make_ids()
    assert torch.equal(load()(ids).logits, model(ids).logits)


def test_a_push_that_broke_off_goes_on_where_it_was(hub, model, tmp_path, no_waiting):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3
    oids = {file.name: huggingface_hub.CommitOperationAdd(file.name, file).upload_info.sha256.hex() for file in shards}
    broken = oids[shards[1].name]
    hub.cuts.append(Cut("PUT", broken, after=1000, times=6))  # the first try and all retries
    with pytest.raises(PushError, match=r"the connection to .* failed .* run the same again"):
        push(tmp_path / "sharded", "me/it")
    assert "config.json" not in hub.files("me/it")  # nothing was committed
    push(tmp_path / "sharded", "me/it")
    sent = [oid for oid, _, _ in hub.received]
    assert all(sent.count(oid) == 1 for oid in oids.values())
    ids = make_ids()
    assert torch.equal(load()(ids).logits, model(ids).logits)


def test_a_download_that_is_cut_goes_on_where_it_was(hub, model, checkpoint, monkeypatch):
    push(checkpoint, "me/it")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cuts.append(Cut("GET", "model.safetensors", after=100_000))
    loaded, ids = load(), make_ids()
    assert len(hub.ranges) == 1
    assert int(hub.ranges[0].removeprefix("bytes=").removesuffix("-")) > 0
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_server_that_is_not_there(hub, checkpoint, no_waiting):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(PushError, match=r"the connection to http://127\.0\.0\.1:.* failed"):
        push(checkpoint, "me/it")


# Tokens, and who may.


def text_of(error):
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(("token", "message"), [("hf_" + "wrong" * 7, "401"), ("hf_" + "reads" * 7, "403")])
def test_a_token_that_may_not_is_refused_and_never_said(token, message, hub, checkpoint, caplog, monkeypatch):
    hub.readers = ("hf_" + "reads" * 7,)
    hub.refusal = f"The token {token} is not one of ours"  # a server that repeats what it was sent
    logging.getLogger("huggingface_hub").propagate = True
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="huggingface_hub"):
        with pytest.raises(PushError, match=message) as caught:
            push(checkpoint, "me/it", token=token)
    assert "repos/create" in caplog.text  # it was logged, and
    assert token not in caplog.text
    assert token not in text_of(caught.value)
    assert hub.repos == {}


def test_the_token_is_in_no_log_and_no_file_of_a_push(hub, checkpoint, caplog, monkeypatch):
    logging.getLogger("huggingface_hub").propagate = True
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="huggingface_hub"):
        push(checkpoint, "me/it")
    assert "/commit/main" in caplog.text
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in content for content in hub.files("me/it").values())


@pytest.mark.parametrize("token", ["hf_" + "a" * 34 + "\n", "hf_ a", "hf_é"])
def test_a_token_that_was_badly_copied(token, hub, checkpoint):
    with pytest.raises(PushError, match="copy it again") as caught:
        push(checkpoint, "me/it", token=token)
    assert token not in text_of(caught.value)


def test_no_token(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    with pytest.raises(PushError, match="no access token of the Hub: `hf auth login`, or set HF_TOKEN"):
        push(checkpoint, "me/it")
    assert hub.requests == []


def test_private_and_branches(hub, model, checkpoint, monkeypatch):
    push(checkpoint, "me/it", private=True)
    push(checkpoint, "me/it", private=True, revision="second")
    push(checkpoint, "me/it", revision="second", data="more")
    assert hub.commits("me/it", "second") == 3
    ids = make_ids()
    assert torch.equal(load(revision="second")(ids).logits, model(ids).logits)
    with pytest.raises(OSError, match="me/it"):
        load(token=False)
    push(checkpoint, "me/open")
    with pytest.raises(PushError, match="me/open is there already, and public"):
        push(checkpoint, "me/open", private=True)


def test_what_is_refused_leaves_no_repository_and_no_branch(hub, checkpoint):
    with pytest.raises(PushError, match="must be a `namespace/name` of the Hub, got `/home/base`"):
        push(checkpoint, "me/it", base_model="/home/base", revision="v1")
    (checkpoint / "README.md").write_text("---\nlicense: [a\n---\n")
    with pytest.raises(PushError, match="its metadata cannot be read"):
        push(checkpoint, "me/it", revision="v1")
    (checkpoint / "README.md").write_bytes(b"\xff")
    with pytest.raises(PushError, match=r"README\.md`: it is not text"):
        push(checkpoint, "me/it", revision="v1")
    assert hub.requests == []


def test_names_that_are_none(hub, checkpoint):
    with pytest.raises(PushError, match="not/a/name"):
        push(checkpoint, "not/a/name")
    with pytest.raises(PushError, match="must be a `namespace/name` of the Hub, got `/home/base`"):
        push(checkpoint, "me/it", base_model="/home/base")


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(hub, model, checkpoint, tmp_path):
    """With HF_ENDPOINT set, as a user would point to another Hub."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
    }
    arguments = [sys.executable, "-m", "symphony_hf.cli", "push", str(checkpoint), "me/it", "--license", "mit"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"{hub.endpoint}/me/it/commit/")
    environment["HF_TOKEN"] = "hf_" + "wrong" * 7
    failed = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: push: http://127.0.0.1")
    assert environment["HF_TOKEN"] not in failed.stderr + failed.stdout
    ids = make_ids()
    assert torch.equal(load()(ids).logits, model(ids).logits)
