"""The tables of conversion/README.md on merging, pruning and fewer experts per token, from result files."""

from pathlib import Path

import numpy as np

from symphony_hf.conversion.compression.shrink import ratio
from symphony_hf.evaluation.perplexity import DocumentScores

BY_GRAPH = ("graph", "centrality")


def compression_table(results):
    """Return the results of merging and pruning as rows, header first."""
    rows = [
        ["model", "command", "experts", "parameters", "active", "perplexity [95%]", "after / before [95%]", "verdict"]
    ]
    for result in results:
        perplexity, experts = result["perplexity"], result["experts"]
        name = Path(result["settings"]["model"]).name
        if not rows[1:] or rows[-1][0] != name:
            rows.append([name, "", str(experts["before"]), *_parameters(result["parameters"]["before"])])
            rows[-1] += [_interval(perplexity["before"], 2), "", ""]
        rows.append([name, _how(result), str(experts["after"]), *_parameters(result["parameters"]["after"])])
        rows[-1] += [
            _interval(perplexity["after"], 2),
            _interval(perplexity["ratio"], 3),
            perplexity["ratio"]["verdict"],
        ]
    return rows


def sweep_table(results):
    """Return the results of top-k sweeps as rows, header first."""
    rows = [["model", "top-k", "active parameters", "perplexity [95%]", "ratio to its own [95%]", "verdict"]]
    for result in results:
        for row in result["rows"]:
            own = row["top_k"] == result["experts"]["top_k"]
            cells = [Path(result["settings"]["model"]).name, str(row["top_k"]), _number(row["parameters"]["active"])]
            cells += [_interval(row["perplexity"], 2)]
            rows.append([*cells, *(("", "") if own else (_interval(row["ratio"], 3), row["ratio"]["verdict"]))])
    return rows


def compare_results(a, b):
    """Return the ratio of perplexities of the smaller models in two result files, paired by document."""
    scores = [
        DocumentScores(kept["names"], np.array(kept["nll"]), np.array(kept["num_tokens"]))
        for kept in (a["documents"]["after"], b["documents"]["after"])
    ]
    return ratio(scores[0], scores[1], a["settings"]["seed"])


def findings(results):
    """Return one sentence for each result with a graph criterion: its perplexity against a baseline's.

    Only results of the same model with the same number of experts are compared: otherwise the larger model would win.
    """
    sentences = []
    for result in results:
        command, by = _command(result), result["settings"]["by"]
        for other in results:
            alike = _command(other) == command and other["settings"]["model"] == result["settings"]["model"]
            alike = alike and other["experts"]["after"] == result["experts"]["after"]
            if by in BY_GRAPH and alike and other["settings"]["by"] not in BY_GRAPH:
                compared = compare_results(result, other)
                sentences.append(
                    f"{Path(result['settings']['model']).name}: {_how(result)}, against {other['settings']['by']}: "
                    f"perplexity {_percent(compared)}: {compared['verdict']}."
                )
    return sentences


def _command(result):
    return str(result["command"].split()[1])


def _how(result):
    settings = result["settings"]
    graph = f" ({settings['graph']})" if settings["by"] in BY_GRAPH else ""
    return f"{_command(result)} by {settings['by']}{graph}"


def _parameters(counted):
    return _number(counted["total"]), _number(counted["active"])


def _number(count):
    return "unknown" if count is None else f"{count / 1e6:,.2f}M"


def _interval(interval, digits):
    estimate, low, high = (f"{interval[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def _percent(interval):
    estimate, low, high = (f"{interval[name] - 1:+.1%}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
