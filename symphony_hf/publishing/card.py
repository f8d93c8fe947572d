"""The model card: what a pushed model is, how to load it, what was measured, and what is not known of it."""

from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from .folder import ModelFolder
from .origin import Origin, hub_name
from .results import Results, eval_results, result_rows
from .usage import loading

PAPER = "2510.16411"
TAGS = ["symphony-smoe", "moe", f"arxiv:{PAPER}"]
PICTURE = "graphs.png"
BEGIN, END = "<!-- symphony card -->", "<!-- end of the symphony card -->"
"""Around what a later push writes anew."""

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
    """The card of a folder's model.

    Args:
        folder: What is pushed.
        repo_id: Where to.
        origin: Where it comes from.
        results: What was measured of it.
        tags: Further ones.
    """
    data = _metadata(folder, repo_id, origin, results, tags)
    text = "\n\n".join([BEGIN, *_sections(folder, repo_id, origin, results), END])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _metadata(
    folder: ModelFolder, repo_id: str, origin: Origin, results: Results | None, tags: list[str]
) -> ModelCardData:
    relation = "adapter" if folder.kind == "adapter" else "finetune"
    data_id = hub_name(origin.data)
    data = ModelCardData(
        base_model=origin.base_model,
        base_model_relation=relation if origin.base_model is not None else None,
        datasets=None if data_id is None else [data_id],
        library_name="symphony_hf" if folder.has_our_modules else _LIBRARIES[folder.kind],
        license=origin.license,
        pipeline_tag=_pipeline_tag(folder),
        tags=[*TAGS, *(tag for tag in tags if tag not in TAGS)],
    )
    if results is not None and results.scores:
        data.model_name = repo_id.split("/")[-1]
        data.eval_results = eval_results(results, origin.data or "text", data_id)
    return data


def _sections(folder: ModelFolder, repo_id: str, origin: Origin, results: Results | None) -> list[str]:
    sections = [
        f"# {repo_id.split('/')[-1]}",
        _what_it_is(folder),
        f"## Loading\n\n{loading(folder, repo_id, origin.base_model)}",
        f"## What it was made from\n\n{_origin_text(origin)}",
    ]
    if folder.settings is not None:
        rows = [["setting", "value"], *([f"`{key}`", f"`{value}`"] for key, value in folder.settings.to_dict().items())]
        sections.append(f"## Settings of the graph\n\n{_table(rows)}")
    if results is not None and results.scores:
        sections.append(f"## Results\n\n{_table(result_rows(results))}\n\n{results.note}")
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
        sentences = [f"A PEFT adapter for a mixture of experts with {symphony}."]
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
        sentences.append("At strength 0 it routes as its base does: the graph was learned beside the routing.")
    return " ".join([*sentences, f"Made with symphony_hf {__version__}."])


def _origin_text(origin: Origin) -> str:
    base = (
        "not known"
        if origin.base_model is None
        else f"[{origin.base_model}](https://huggingface.co/{origin.base_model})"
    )
    licence = "not known: ask whoever made it before you use it" if origin.license is None else f"`{origin.license}`"
    rows = [["", ""], ["base model", base], ["data", origin.data or "not known"], ["licence", licence]]
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)
