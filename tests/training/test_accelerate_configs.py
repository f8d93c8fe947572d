"""The recipes' accelerate configurations load and match their names."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
EXPECTED = {  # distributed type, ZeRO stage, where the optimizer's states are, machines
    "cpu": ("NO", None, None, 1),
    "single_gpu": ("NO", None, None, 1),
    "ddp": ("MULTI_GPU", None, None, 1),
    "zero2": ("DEEPSPEED", 2, "none", 1),
    "zero3": ("DEEPSPEED", 3, "none", 1),
    "zero3_offload": ("DEEPSPEED", 3, "cpu", 1),
    "zero3_two_nodes": ("DEEPSPEED", 3, "none", 2),
}


def test_there_are_no_others():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_is_what_its_name_says(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    deepspeed = config.deepspeed_config or {}
    found = (
        config.distributed_type.value,
        deepspeed.get("zero_stage"),
        deepspeed.get("offload_optimizer_device"),
        config.num_machines,
    )
    assert found == EXPECTED[name]
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision == ("no" if name == "cpu" else "bf16")
    if deepspeed.get("zero_stage") == 3:
        assert deepspeed["zero3_init_flag"] is False
        assert deepspeed["zero3_save_16bit_model"] is True
    assert path.read_text().startswith("# ")
