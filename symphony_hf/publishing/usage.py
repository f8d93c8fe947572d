"""How a pushed model is loaded, in a few lines of Python: with symphony_hf, and without it where that is right."""

from .folder import ModelFolder


def loading(folder: ModelFolder, repo_id: str, base_model: str | None) -> str:
    """The text of a card's section on loading.

    Args:
        folder: What is pushed.
        repo_id: Where to.
        base_model: Of an adapter; a placeholder stands where it is not known.
    """
    auto = "AutoModelForImageTextToText" if "vision_config" in folder.config else "AutoModelForCausalLM"
    if folder.kind == "folded":
        lines = [f"from transformers import {auto}", f'model = {auto}.from_pretrained("{repo_id}")']
        return f"{_python(lines)}\n\nNothing else is needed; servers run it as any checkpoint of its family."
    if folder.kind == "adapter":
        return _adapter(folder, repo_id, base_model or "BASE_MODEL")
    lines = [
        "import symphony_hf  # brings the graphs back",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("{repo_id}")',
    ]
    foldable = folder.settings is not None and folder.settings.smoothing == "logits"
    served = (
        '`symphony_hf.export_folded(model, "folded")` writes a plain checkpoint with the same logits, for software '
        "that does not know of graphs."
        if foldable
        else "It smooths scores, which no plain router computes: it cannot be folded into a plain checkpoint."
    )
    warning = "**Not without `symphony_hf`**: software that does not know it would route without the graphs."
    return f"{_python(lines)}\n\n{warning} {served}"


def _adapter(folder: ModelFolder, repo_id: str, base_model: str) -> str:
    lines = [
        "import symphony_hf",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{base_model}")',
    ]
    if folder.graphs:
        lines.append("symphony_hf.symphonize(model)  # with the settings that it was trained with")
    lines.append(f'model = PeftModel.from_pretrained(model, "{repo_id}")')
    warning = (
        "\n\nPEFT loads an adapter on a base that is not symphonized in silence, without its graphs: symphonize first."
        if folder.graphs
        else ""
    )
    return _python(lines) + warning


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
