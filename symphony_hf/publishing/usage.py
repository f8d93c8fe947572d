"""How a pushed model is loaded, in a few lines of Python: with symphony_hf, and without it where that is right."""

from .folder import RECORD_NAME, ModelFolder


def loading(folder: ModelFolder, repo_id: str, base_model: str | None) -> str:
    """The text of a card's section on loading.

    Args:
        folder: What is pushed.
        repo_id: Where to.
        base_model: Of an adapter; a placeholder stands where it is not known.
    """
    auto = folder.auto_class
    if folder.kind == "plain" and not folder.has_our_modules:
        lines = [f"from transformers import {auto}", f'model = {auto}.from_pretrained("{repo_id}")']
        return f"{_python(lines)}\n\nNothing else is needed; servers run it as any checkpoint of its family."
    if folder.kind == "adapter":
        return _adapter(folder, repo_id, base_model or "BASE_MODEL")
    lines = [
        f"import symphony_hf  # brings the {'experts' if folder.has_our_modules else 'graphs'} back",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("{repo_id}")',
    ]
    return f"{_python(lines)}\n\n{_served(folder)}"


def _served(folder: ModelFolder) -> str:
    """What other software can do with it."""
    if folder.has_our_modules:
        return "**Not without `symphony_hf`**: software that does not know it has no place for its experts."
    warning = "**Not without `symphony_hf`**: software that does not know it would route without the graphs."
    if folder.settings is None or folder.settings.smoothing != "logits":
        return (
            f"{warning} It smooths scores, which no plain router computes: it cannot be folded into a plain checkpoint."
        )
    return (
        f'{warning} `symphony_hf.export_folded(model, "folded")` writes a plain checkpoint with the same logits, for '
        "software that does not know of graphs."
    )


def _adapter(folder: ModelFolder, repo_id: str, base_model: str) -> str:
    auto = f"from transformers import {folder.auto_class}"
    base = f'model = {folder.auto_class}.from_pretrained("{base_model}")'
    peft = f'model = PeftModel.from_pretrained(model, "{repo_id}")'
    if not folder.graphs:
        return _python(["from peft import PeftModel", auto, base, peft])
    silent = "PEFT's own loader puts an adapter on a base that is not symphonized in silence, without its graphs"
    if RECORD_NAME in folder.files:
        lines = ["import symphony_hf", auto, base, f'model = symphony_hf.load_adapter(model, "{repo_id}")']
        return f"{_python(lines)}\n\nThe plain base is symphonized as the adapter needs it. {silent}."
    symphonize = "symphony_hf.symphonize(model)  # with the settings that it was trained with"
    lines = ["import symphony_hf", "from peft import PeftModel", auto, base, symphonize, peft]
    return f"{_python(lines)}\n\n{silent}: symphonize first."


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
