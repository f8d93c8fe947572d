"""The model card: what a pushed model is, how to load it, its origin and its results."""

import re

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from symphony_hf.compat import __version__
from symphony_hf.errors import PushError
from symphony_hf.files import ADAPTER_RECORD
from symphony_hf.tables import Table

from .folder import ModelFolder
from .hub_names import hub_name
from .provenance import Origin, names
from .results import Results, eval_results, result_rows


def loading(folder: ModelFolder, repo_id: str, base_model: str | None) -> str:
    """Return the text of the card's section on loading. An adapter without a known base model has a placeholder."""
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


_NEEDED = (
    "**Not without `symphony_hf`** (`pip install symphony-hf`). Where it is installed, programs that do not import it "
    "load the model too; where it is not, transformers refuses it."
)


def _served(folder: ModelFolder) -> str:
    """Return what other software can do with the model."""
    if folder.has_our_modules:
        return f"{_NEEDED} Other software has no place for its experts."
    if folder.settings is None or folder.settings.smoothing != "logits":
        return (
            f"{_NEEDED} It smooths scores, which no plain router computes: it cannot be folded into a plain checkpoint."
        )
    return (
        f'{_NEEDED} `symphony_hf.export_folded(model, "folded")` writes a plain checkpoint with the same logits, for '
        "software without support for graphs."
    )


def _adapter(folder: ModelFolder, repo_id: str, base_model: str) -> str:
    auto = f"from transformers import {folder.auto_class}"
    base = f'model = {folder.auto_class}.from_pretrained("{base_model}")'
    peft = f'model = PeftModel.from_pretrained(model, "{repo_id}")'
    if not folder.graphs:
        return _python(["from peft import PeftModel", auto, base, peft])
    if ADAPTER_RECORD in folder.files:
        lines = ["import symphony_hf", auto, base, f'model = symphony_hf.load_adapter(model, "{repo_id}")']
        return (
            f"{_python(lines)}\n\nThe plain base is symphonized as the adapter needs it, also by PEFT's own "
            "`PeftModel.from_pretrained`. Where `symphony_hf` is not installed, PEFT refuses the adapter."
        )
    symphonize = "symphony_hf.symphonize(model)  # with the settings that it was trained with"
    lines = ["import symphony_hf", "from peft import PeftModel", auto, base, symphonize, peft]
    silent = "PEFT's own loader silently loads it without its graphs if the base is not symphonized"
    return f"{_python(lines)}\n\n{silent}: symphonize first."


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


PAPER = "2510.16411"
TAGS = ["symphony-smoe", "moe", f"arxiv:{PAPER}"]
PICTURE = "graphs.png"
BEGIN, END = "<!-- symphony card -->", "<!-- end of the symphony card -->"
"""Marks around the part that later pushes rewrite."""

EFFECT = (
    "Measured at small scale only (fine-tuning of a model of 1.1M parameters that reads characters, eight seeds): the "
    "graph raises the loss on clean text by 0.0075 nats a character [0.0060, 0.0091], and on the text of the "
    "pre-training by 0.0391 [0.0369, 0.0413]; where 15% of the characters are damaged, 4.6 points more of the experts' "
    "choices stay the same, and the loss is not distinguishable (-0.0086 [-0.0172, 0.0000]) (`symphony ablate "
    "recipes/wikitext103-216m/ablation/fine-tuning-forms.yaml --output DIR --set data.path=TEXT --set "
    "pretraining.path=FIRST_TEXT`). For this model, compare with the same training at `strength: 0`."
)
"""The effect of graphs where it was measured; a test compares the figures with the result file."""

_LIBRARIES = {"symphony": "symphony_hf", "plain": "transformers", "adapter": "peft"}

_CITATION = f"""```bibtex
@misc{{symphonysmoe,
  title         = {{Modeling Expert Interactions in Sparse Mixture of Experts via Graph Structures}},
  year          = {{2025}},
  eprint        = {{{PAPER}}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/{PAPER}}}
}}
```"""


def model_card(
    folder: ModelFolder, repo_id: str, origin: Origin, results: Results | None, tags: list[str]
) -> ModelCard:
    """Return the card of a folder's model. `tags` are added to the usual ones."""
    data = _metadata(folder, repo_id, origin, results, tags)
    text = "\n\n".join([BEGIN, *_sections(folder, repo_id, origin, results), END])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _metadata(
    folder: ModelFolder, repo_id: str, origin: Origin, results: Results | None, tags: list[str]
) -> ModelCardData:
    relation = "adapter" if folder.kind == "adapter" else "finetune"
    data_id = hub_name(origin.data)
    ours = ["moe"] if folder.kind == "adapter" and not folder.graphs else TAGS
    data = ModelCardData(
        base_model=origin.base_model,
        base_model_relation=relation if origin.base_model is not None else None,
        datasets=None if data_id is None else [data_id],
        library_name="symphony_hf" if folder.has_our_modules else _LIBRARIES[folder.kind],
        license=origin.license,  # type: ignore[arg-type]  # several, if a card has them
        pipeline_tag=_pipeline_tag(folder),
        tags=list(dict.fromkeys([*ours, *tags])),
    )
    if results is not None and results.scores:
        data.model_name = repo_id.split("/")[-1]
        data.eval_results = eval_results(results, origin.data or "text", data_id)
    return data


def _sections(folder: ModelFolder, repo_id: str, origin: Origin, results: Results | None) -> list[str]:
    base_model = origin.base_model if isinstance(origin.base_model, str) else None
    sections = [
        f"# {repo_id.split('/')[-1]}",
        _what_it_is(folder),
        f"## Loading\n\n{loading(folder, repo_id, base_model)}",
        f"## What it was made from\n\n{_origin_text(origin)}",
    ]
    if folder.settings is not None:
        rows = [(f"`{key}`", f"`{value}`") for key, value in folder.settings.to_dict().items()]
        sections.append(f"## Settings of the graph\n\n{Table('', ('setting', 'value'), rows).to_markdown()}")
    if folder.graphs and (folder.settings is None or folder.settings.strength != 0):
        sections.append(f"## What to expect of the graph\n\n{EFFECT}")
    if results is not None and results.scores:
        sections.append(
            f"## Results\n\n{Table('', ('', 'value'), result_rows(results)).to_markdown()}\n\n{results.note}"
        )
    if folder.graphs:
        caption = "How often two experts of a layer are chosen together"
        sections.append(f"## Graphs\n\n![{caption}]({PICTURE})\n\n{caption}; above, the experts' loads.")
    return [*sections, f"## Citation\n\n{_CITATION}"]


def _pipeline_tag(folder: ModelFolder) -> str | None:
    if folder.auto_class == "AutoModelForImageTextToText":
        return "image-text-to-text"
    architectures = folder.config.get("architectures") or []
    causal = any(str(name).endswith("ForCausalLM") for name in architectures)
    return "text-generation" if causal or folder.config.get("task_type") == "CAUSAL_LM" else None


def _what_it_is(folder: ModelFolder) -> str:
    symphony = f"[Symphony routing](https://arxiv.org/abs/{PAPER})"
    graph = "a graph of which experts are chosen together, learned while the model was trained"
    family = f"`{folder.config.get('model_type')}`"
    if folder.kind == "adapter":
        routing = f"with {symphony}" if folder.graphs else "without graphs of its own"
        sentences = [f"A PEFT adapter for a mixture of experts, {routing}."]
    elif folder.kind == "symphony":
        sentences = [f"A mixture of experts ({family}) with {symphony}: each expert's gate is smoothed over {graph}."]
    else:
        readers = (
            "symphony_hf, which has its experts" if folder.has_our_modules else "any software that runs this family"
        )
        sentences = [f"A mixture of experts ({family}) without graphs of its own, for {readers}."]
        # A checkpoint does not tell that it was folded. One that was folded just now has its graphs beside it.
        folded = f"{symphony} folded into their weights: {graph}, which smooths each expert's gate."
        sentences.append(
            f"Its routers have {folded}"
            if folder.graphs
            else f"Where it was trained with graphs, its routers have {folded}"
        )
    if folder.graphs:
        sizes = " or ".join(str(size) for size in sorted({len(graph) for graph in folder.graphs.values()}))
        sentences.append(f"{len(folder.graphs)} layers have a graph, of {sizes} experts each.")
    if folder.settings is not None and folder.settings.strength == 0:
        sentences.append("At strength 0 it routes as its base does: routing ignores the graph.")
    return " ".join([*sentences, f"Made with symphony_hf {__version__}."])


def _origin_text(origin: Origin) -> str:
    bases = [f"[{name}](https://huggingface.co/{name})" for name in names(origin.base_model)]
    licences = [f"`{name}`" for name in names(origin.license)] or ["not known: ask whoever made it before you use it"]
    rows = [
        ("base model", ", ".join(bases) or "not known"),
        ("data", origin.data or "not known"),
        ("licence", ", ".join(licences)),
    ]
    return Table("", ("", ""), rows).to_markdown()


_TO_FILL_IN = "[More Information Needed]"


def read_card(readme: str, where: str) -> ModelCard:
    """Read a README as a card. Metadata that cannot be read raises PushError."""
    try:
        return ModelCard(readme)
    except (ValueError, KeyError, TypeError, YAMLError) as error:
        raise PushError(f"{where}: its metadata cannot be read ({error}): mend it, or move it away") from error


def written_origin(readme: str, where: str) -> Origin:
    """Return the base model and the license in a README's metadata. Metadata that cannot be read raises PushError."""
    data = read_card(readme, where).data
    return Origin(data.get("base_model"), data.get("license"))


def merge_cards(existing: str, card: ModelCard, where: str) -> str:
    """Merge a card into an existing README, which `where` names in errors.

    Missing metadata is added, lists are joined, and the model-index is replaced; the base model and the license are the
    card's, whose text states them, see `complete`. The part between the marks of an earlier push is rewritten; all
    other text stays, and an empty one becomes the card's. Metadata that cannot be read raises PushError.
    """
    merged = _merge(existing, card, where)
    if merged.data.get("license") != card.data.get("license"):
        for name in ("license", "license_name", "license_link"):  # the last two describe a license `other`
            merged.data[name] = card.data.get(name)
    merged.data["base_model"] = card.data.get("base_model")
    return str(merged)


def _merge(existing: str, card: ModelCard, where: str) -> ModelCard:
    merged = read_card(existing, where)
    data, of_model = merged.data, ["eval_results", "model_name"]
    if BEGIN in merged.text:  # an earlier push wrote these too, maybe of another model or form
        of_model += ["library_name", "pipeline_tag", "base_model_relation"]
        for key in of_model:
            data[key] = None
    for key, value in vars(card.data).items():
        there = data.get(key)
        if isinstance(value, list) and key != "eval_results":
            there = [there] if isinstance(there, str) else list(there or [])
            data[key] = [*there, *(item for item in value if item not in there)]
        elif value is not None and (there is None or key in of_model):
            data[key] = value
    before, begin, rest = merged.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        ours = card.text[card.text.index(BEGIN) : card.text.index(END)]
        merged.text = f"{before}{ours}{END}{after}"
    elif not merged.text.strip():  # metadata alone, as the Hub writes for a new repository with a license
        merged.text = card.text
    return merged


def with_metadata_of(readme: str, card: ModelCard, where: str) -> str:
    """Return a README with a card's metadata added: single values replace those that are there, lists are joined."""
    merged = _merge(readme, card, where)
    for key, value in vars(card.data).items():
        if value is not None and not isinstance(value, list):
            merged.data[key] = value
    return str(merged)


def is_template(readme: str) -> bool:
    """Return whether a README is the Hub's unfilled template, which PEFT writes beside each adapter."""
    return readme.count(_TO_FILL_IN) > 20


def is_card_alone(readme: str) -> bool:
    """Return whether a README has no text around our card. It may have metadata of its own."""
    text = re.sub(r"\A---\s*\n.*?\n---\s*\n", "", readme, flags=re.DOTALL).strip()
    return text.startswith(BEGIN) and text.endswith(END)
