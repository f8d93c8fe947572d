"""Settings that make the project's own commands a matter of seconds, on text that is made up."""

from pathlib import Path

from symphony_hf.training.quickstart import QuickstartSettings

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "config.yaml"


def quickstart_settings(folder):
    """A quickstart of eight steps, which writes to `out` in the folder."""
    text = folder / "text"
    for split, count in (("train", 30), ("validation", 4), ("test", 14)):
        (text / split).mkdir(parents=True)
        for number in range(count):
            offset = number * 31 + len(split)
            lines = [f"line{(offset + n * 7) % 97} of text{n % 23} says value{offset % 19}" for n in range(40)]
            (text / split / f"{number}.txt").write_text("\n".join(lines))
    return QuickstartSettings(
        output=str(folder / "out"),
        data=str(text),
        pretrain_steps=4,
        finetune_steps=4,
        batch_size=4,
        block_size=32,
        vocab_size=300,
        documents=12,
    )


def recipe_overrides(folder):
    """For the recipe of the quickstart: three steps, which write to `run` in the folder."""
    text = folder / "text"
    text.mkdir()
    words = [f"word{n} speaks of thing{n * 7 % 13} and place{n * 5 % 11}" for n in range(400)]
    for number in range(40):
        (text / f"{number}.txt").write_text("\n".join(words[number * 7 : number * 7 + 60]))
    return {
        "data.path": str(text),
        "data.vocab_size": 300,
        "data.block_size": 16,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "output.directory": str(folder / "run"),
    }
