"""`symphony eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import BatchSize, BlockSize, Dtype, Revision, Split, Text, TextColumn, Tokenizer, app, numbers


@app.command(
    "eval",
    epilog="Examples: symphony eval runs/symphony --against runs/plain --attack aaa,keyboard --- "
    "symphony eval allenai/OLMoE-1B-7B-0924 --data wiki.test.txt --attack all --severity 1,3,5 --seeds 0 --- "
    "symphony eval runs/phi3-qnli --task classification --name qnli --documents 1000 --- "
    "symphony eval runs/llava/final --task vqa --data digits --attack all-images --severity 1,3,5",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hub.")],
    against: Annotated[str | None, typer.Option(help="Another checkpoint, to compare it with.")] = None,
    task: Annotated[
        str,
        typer.Option(
            help="text: perplexity of any causal model; classification: accuracy at a GLUE task; vqa: accuracy at "
            "questions about images, of any vision-language model."
        ),
    ] = "text",
    data: Annotated[
        str | None,
        typer.Option(
            help="text: text file, table, folder, or Hub data set, instead of the Python library's own sources. "
            "classification: table or folder with the columns of --name, instead of GLUE on the Hub. vqa: LLaVA's "
            "JSON, or a folder of such, instead of digits."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="classification: qnli, sst2, ...; without it and --data, an offline stand-in.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="vqa: folder that the JSON's image names are in.")] = None,
    answers: Annotated[
        str | None, typer.Option(help="vqa: choose among all right answers (up to 100 of them), or free.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", help="vqa: of a free answer; 32 if not given.")
    ] = None,
    split: Split = None,
    text_column: Annotated[str | None, typer.Option("--text_column", help="text: of a table; text.")] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="all, or with commas. On text: aaa (if none is given), keyboard, char_delete, char_insert, char_swap, "
            "homoglyph, word_drop, word_shuffle. On images: all-images, or gaussian_noise (if none is given), "
            "shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, "
            "brightness, contrast, elastic_transform, pixelate, jpeg_compression."
        ),
    ] = None,
    severity: Annotated[str, typer.Option(help="From 1 to 5, with commas.")] = "1,2,3,4,5",
    seeds: Annotated[str, typer.Option(help="Of the attacks, with commas.")] = "0,1,2",
    documents: Annotated[int, typer.Option(help="Or questions, at most.")] = 100,
    block_size: Annotated[
        int | None,
        typer.Option("--block_size", help="text: tokens of a clean window; a quarter of what the models take."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Windows or questions a forward.")] = 8,
    dtype: Dtype = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Or processor, where a model has none of its own.")] = None,
    revision: Revision = None,
    against_revision: Annotated[str | None, typer.Option("--against_revision", help="Of the other one.")] = None,
    output: Annotated[
        str, typer.Option(help="Folder for result.json, robustness.png and finished cells.")
    ] = "symphony-eval",
) -> None:
    """Measure how a model holds up under attack on its input, alone or against another one. Stopped, it goes on."""
    from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness
    from symphony_hf.evaluation.robustness.settings import RobustnessSettings
    from symphony_hf.evaluation.robustness.tables import print_robustness

    settings = RobustnessSettings(
        model=model,
        against=against,
        task=task,
        data=data,
        name=name,
        images=images,
        answers=answers,
        max_new_tokens=max_new_tokens,
        split=split,
        text_column=text_column,
        attacks=None if attack is None else tuple(attack.split(",")),
        severities=numbers(severity, "eval", "severity"),
        seeds=numbers(seeds, "eval", "seeds"),
        documents=documents,
        block_size=block_size,
        batch_size=batch_size,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        against_revision=against_revision,
        output=output,
    )
    result = evaluate_robustness(settings)
    print_robustness(result)
    from symphony_hf.diagnostics.plots.attacks import plot_robustness  # matplotlib is slow to import

    print(f"Curves: {plot_robustness(result, Path(output) / 'robustness.png').resolve()}")


@app.command(epilog="Example: symphony attack wiki.test.txt --attack aaa --seed 0 --output wiki.test.attacked.txt")
def attack(
    file: Annotated[str, typer.Argument(help="A text file, UTF-8.")],
    output: Annotated[str, typer.Option(help="Where the attacked text goes.")],
    attack: Annotated[
        str,
        typer.Option(help="aaa, keyboard, char_delete, char_insert, char_swap, homoglyph, word_drop or word_shuffle."),
    ] = "aaa",
    severity: Annotated[int, typer.Option(help="From 1 to 5; 1 is the paper's, of aaa.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Share of words or letters, instead of a severity's.")] = None,
    minimum: Annotated[int | None, typer.Option(help="Of aaa: words replaced in a line at least; else 1.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of words and letters.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Write the attacked form of a text file: the same for the same file, seed and attack, on any machine."""
    from symphony_hf.evaluation.attacks.files import attack_file

    written = attack_file(
        file, output, attack, severity=severity, rate=rate, minimum=minimum, seed=seed, overwrite=overwrite
    )
    typer.echo(
        f"{attack} at rate {written.rate:g}, seed {seed}: {written.num_changed:,} of {written.num_lines:,} lines "
        f"changed. Written to {written.path.resolve()}"
    )


@app.command(epilog="Example: symphony report runs/symphony runs/plain symphony-eval --output report.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of symphony train, quickstart, eval or routing.", metavar="RUN..."),
    ],
    output: Annotated[Path, typer.Option(help="The HTML file; replaced where there is one.")] = Path("report.html"),
) -> None:
    """Compare runs on one HTML page, with pictures and sortable tables: one file, which needs no network."""
    from symphony_hf.evaluation.report.find_runs import read_runs
    from symphony_hf.evaluation.report.page import write_page

    page = write_page(read_runs(runs), output)
    plural = "" if len(runs) == 1 else "s"
    typer.echo(f"{len(runs)} run{plural}, {page.stat().st_size / 1e6:.1f} MB: {page.resolve()}")


@app.command(
    epilog="Examples: symphony routing allenai/OLMoE-1B-7B-0924 --data wiki.test.txt --- "
    "symphony routing runs/mine/final --against runs/mine/checkpoint-100 --against runs/mine/checkpoint-500",
)
def routing(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hub; any MoE model.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Earlier checkpoints of it, the earliest first; once for each.")
    ] = None,
    data: Text = None,
    split: Split = None,
    text_column: TextColumn = "text",
    attack: Annotated[str, typer.Option(help="As of `symphony eval`, with commas; none for none.")] = "aaa",
    severity: Annotated[str, typer.Option(help="From 1 to 5, with commas.")] = "1,3,5",
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    documents: Annotated[int, typer.Option(help="At most.")] = 60,
    words: Annotated[int, typer.Option(help="Of a document, about: its first lines.")] = 400,
    block_size: BlockSize = None,
    batch_size: BatchSize = 8,
    similarity_tokens: Annotated[
        int, typer.Option("--similarity_tokens", help="On which experts are compared; 0: they are not.")
    ] = 256,
    drop_first: Annotated[
        bool, typer.Option("--drop_first/--no_drop_first", help="The loss without each token's first expert.")
    ] = True,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    output: Annotated[
        str, typer.Option(help="Folder for result.json, matrices.safetensors and pictures.")
    ] = "symphony-routing",
) -> None:
    """See how a model routes real text: loads, margins, experts, domains, attacks, and the way from its checkpoints."""
    from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS
    from symphony_hf.evaluation.routing.observe import observe_routing
    from symphony_hf.evaluation.routing.pictures import draw_observation
    from symphony_hf.evaluation.routing.settings import RoutingSettings
    from symphony_hf.evaluation.routing.tables import print_observation

    attacks = {"all": tuple(TEXT_ATTACKS), "none": ()}
    settings = RoutingSettings(
        model=model,
        against=tuple(against or ()),
        data=data,
        split=split,
        text_column=text_column,
        attacks=attacks.get(attack, tuple(attack.split(","))),
        severities=numbers(severity, "routing", "severity"),
        seed=seed,
        documents=documents,
        words=words,
        block_size=block_size,
        batch_size=batch_size,
        drop_first=drop_first,
        similarity_tokens=similarity_tokens,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        output=output,
    )
    result = observe_routing(settings)
    print_observation(result)
    pictures = draw_observation(result, Path(output))
    print(f"{len(pictures)} pictures, result.json and matrices.safetensors: {Path(output).resolve()}")
