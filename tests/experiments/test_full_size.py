"""The recipes' models, made, run, saved and loaded again: here with all widths divided."""

import json

import pytest

from symphony_hf import ConfigError
from symphony_hf.experiments import full_size
from symphony_hf.experiments.full_size import print_full_size, run_full_size


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.filterwarnings("ignore:upcycle. .* of this `qwen2_moe`")  # settings that llama.cpp ignores
@pytest.mark.parametrize("model", full_size.MODELS)
def test_a_small_copy_of_each_goes_all_the_way(model, tmp_path, capsys):
    file = tmp_path / "seen.json"
    result = run_full_size(model, tmp_path, tokens=8, shrink=32, output=file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert list(tmp_path.iterdir()) == [file]
    assert result["difference"] == 0
    assert result["largest_logit"] > 0
    assert result["tokens"] == 8 + (576 if model == "4.2b" else 0)
    assert [seen["stage"] for seen in result["stages"]] == ["make", "run", "again"]
    for seen in result["stages"]:
        assert seen["peak_memory_bytes"] > 1e8  # Python and PyTorch alone are that large
        assert all(step["seconds"] > 0 for step in seen["steps"])
    print_full_size(result)
    assert str(file) in capsys.readouterr().out.replace("\n", "")


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown model `7\.4`; did you mean `7\.4b`"):
        run_full_size("7.4", tmp_path)
    with pytest.raises(ConfigError, match="`tokens` must be at least 1"):
        run_full_size("7.4b", tmp_path, tokens=0)
    with pytest.raises(ConfigError, match="which is no folder"):
        run_full_size("7.4b", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a folder, and the result is a file"):
        run_full_size("7.4b", tmp_path, output=tmp_path)
