"""Sections of the page with measured levels, comparisons and training curves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from symphony_hf.tables import Table

from .pictures import Picture, from_svg
from .runs import Level, Run
from .tables import interval, is_share, level, make_table, number, sample, show, text, verdict

Named = Mapping[str, Run]
"""Runs by their name on the page."""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        id: Id of the anchor.
        notes: Sentences below the title.
        commands: Command lines by run.
    """

    id: str
    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    commands: Mapping[str, str] = field(default_factory=dict)


def label(runs: Named, name: str, model: str) -> str:
    """Return a model's name in pictures and tables: its run's name if there are several runs, and its own name."""
    return ": ".join(part for part in (name if len(runs) > 1 or not model else "", model) if part)


def measured(runs: Named) -> Section | None:
    """Show the levels of each model with their intervals."""
    from symphony_hf.diagnostics import plots

    found = [(name, level_) for name, run in runs.items() for level_ in run.levels]
    if not found:
        return None
    rows = [
        [text(name), text(value.model), text(value.metric), text(value.text), *level(value), sample(value)]
        for name, value in found
    ]
    pictures = []
    for metric in dict.fromkeys(value.metric for _, value in found):
        levels: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
        for name, value in found:
            if value.metric == metric:
                by_text = levels.setdefault(label(runs, name, value.model), {})
                by_text[value.text] = (value.value, value.low, value.high)
        alt = f"{metric} by model: " + "; ".join(
            f"{model} {', '.join(f'{text_} {show(value[0], metric)}' for text_, value in by.items())}"
            for model, by in levels.items()
        )
        pictures.append(from_svg(plots.draw_levels(levels, metric, is_share(metric)), alt, _capital(metric)))
    header = ("run", "model", "measure", "on", "value", "low", "high", "measured on")
    notes = [
        "Intervals are 95% intervals over documents, windows or questions, of each model alone. Most of their width is "
        "the variety of these, which the models share, so two models whose intervals overlap may still differ: use a "
        "paired comparison. Losses and perplexities are per token: those on different text or with different "
        "tokenizers do not compare."
    ]
    if not any(run.comparisons for run in runs.values()):
        notes.append("For a paired comparison with a verdict: symphony eval ONE/final --against OTHER/final.")
    return Section("measured", "What was measured", notes, pictures, [make_table("Levels", header, rows, len(runs))])


def compared(runs: Named) -> Section | None:
    """Show comparisons of models with verdicts."""
    found = [(name, value) for name, run in runs.items() for value in run.comparisons]
    if not found:
        return None
    rows = [
        [
            text(name),
            text(f"{value.first} against {value.second}"),
            text(value.text),
            text(value.what),
            interval(value.value),
            number(value.value.p_value),
            verdict(value.verdict),
        ]
        for name, value in found
    ]
    note = (
        "Paired over documents or questions; the verdict is about the first model. Better or worse requires two "
        "things: the 95% interval excludes the value of equal models (1 for a ratio, 0 for a difference), and p is at "
        "most 5%. p: when the two models' scores are swapped at random, document by document, a difference this large "
        "occurs in this share of draws. Of equal models, one comparison in twenty would be better or worse by chance; "
        f"there are {len(rows)}. Other training seeds may give others."
    )
    header = ("run", "models", "on", "what", "value [95%]", "p", "verdict")
    return Section(
        "compared", "Against each other", [note], tables=[make_table("Comparisons", header, rows, len(runs))]
    )


def attacked(runs: Named) -> Section | None:
    """Show metrics by severity of the attacks."""
    found = [(name, row) for name, run in runs.items() for row in run.attacks]
    if not found:
        return None
    rows = [
        [
            text(name),
            text(row.model),
            text(row.attack),
            text("all") if row.severity is None else number(row.severity),
            text(row.metric),
            interval(row.value, row.metric),
            interval(row.change),
            interval(row.untouched),
        ]
        for name, row in found
    ]
    header = ("run", "model", "attack", "severity", "measure", "value [95%]", "against clean", "on untouched tokens")
    note = (
        "Against clean: attacked / clean for perplexity, attacked - clean for accuracy. On untouched tokens: the same "
        "over the tokens that the attack leaves alone, so that a changed number of tokens does not affect it. "
        "Perplexities are per token: those of different tokenizers do not compare."
    )
    table = make_table("Attacks by severity", header, rows, len(runs))
    return Section("attacked", "Under attack", [note], list(_attack_pictures(runs)), [table])


def _attack_pictures(runs: Named) -> Iterator[Picture]:
    from symphony_hf.diagnostics import plots

    found = [(name, row) for name, run in runs.items() for row in run.attacks if row.severity is not None]
    clean = {
        (name, value.model, value.metric): value
        for name, run in runs.items()
        for value in run.levels
        if value.text == "clean"
    }
    for metric in dict.fromkeys(row.metric for _, row in found):
        own = [(name, row) for name, row in found if row.metric == metric]
        ends = [end for _, row in own for end in (row.value.low, row.value.high)]
        ends += [end for (_, _, of), value in clean.items() if of == metric for end in _ends(value)]
        for attack in dict.fromkeys(row.attack for _, row in own):
            curves: dict[str, dict[int, tuple[float, float | None, float | None]]] = {}
            for name, row in own:
                if row.attack != attack:
                    continue
                curve = curves.setdefault(label(runs, name, row.model), {})
                start = clean.get((name, row.model, metric))
                if start is not None:
                    curve[0] = (start.value, start.low, start.high)
                curve[row.severity or 0] = (row.value.estimate, row.value.low, row.value.high)
            content = plots.draw_attack(curves, attack, metric, (min(ends), max(ends)))
            described = "; ".join(
                f"{model} from {curve[min(curve)][0]:.4g} to {curve[max(curve)][0]:.4g}"
                for model, curve in curves.items()
            )
            alt = f"{metric} by severity of {attack}: {described}"
            yield from_svg(content, alt, f"{_capital(metric)} under {attack}")


def _ends(value: Level) -> tuple[float, float]:
    return (
        value.value if value.low is None else value.low,
        value.value if value.high is None else value.high,
    )


def trained(runs: Named) -> Section | None:
    """Show losses by step."""
    from symphony_hf.diagnostics import plots

    found = [
        (name, model, by_name)
        for name, run in runs.items()
        for model, by_name in run.curves.items()
        if any(by_name.values())
    ]
    if not found:
        return None
    pictures, captions = [], {"train": "Training loss", "eval": "Evaluation loss"}
    for kind, caption in captions.items():
        curves = {label(runs, name, model): by[kind] for name, model, by in found if by.get(kind)}
        if curves:
            described = "; ".join(
                f"{model} from {points[0][1]:.3f} to {points[-1][1]:.3f}" for model, points in curves.items()
            )
            pictures.append(from_svg(plots.draw_losses(curves, kind), f"{caption} by step: {described}", caption))
    rows = []
    for name, model, by_name in found:
        train, held_out = by_name.get("train") or [], by_name.get("eval") or []
        rows.append(
            [
                text(name),
                text(model),
                number(int(train[-1][0]) if train else None),
                number(train[0][1] if train else None),
                number(train[-1][1] if train else None),
                number(held_out[-1][1] if held_out else None),
                number(min(loss for _, loss in held_out) if held_out else None),
            ]
        )
    header = ("run", "model", "last step", "first loss", "last loss", "last evaluation", "lowest evaluation")
    note = (
        "Losses in nats per token. Training losses: each point is the mean since the previous one. Evaluation losses: "
        "the validation data at that step."
    )
    return Section("trained", "Training", [note], pictures, [make_table("Losses", header, rows, len(runs))])


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
