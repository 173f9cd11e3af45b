"""The embedded model's card and its picture, from the measurements of ``evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {
    "add": "addition, up to 5 digits",
    "sub": "subtraction, up to 5 digits, negative results too",
    "mul": "multiplication, up to 2 x 2 digits",
    "mul3x2": "multiplication, 3 x 2 digits",
    "mul3x3": "multiplication, 3 x 3 digits",
    "sum": "sums of 3 to 5 numbers, up to 3 digits",
    "compare": "comparison, up to 5 digits",
    "word": "word problems, one step",
    "chat": "small talk and refusals (wordings like the training's)",
}

HEAD = """# headrace-tiny

The model that comes with Headrace: {parameters:,} parameters ({size:.1f} MB in bf16) in the published `nemotron_h`
layout, {layers} layers (`{pattern}`: M Mamba-2, * attention, E LatentMoE), {experts} experts of which {top_k} answer
each token, a shared expert, latent projections and a multi-token-prediction head. It does arithmetic and shows its
work inside `<think>` ... `</think>`. It was trained from nothing by `benchmarks/tiny/train.py` on generated problems,
on two CPU cores.

    python -m benchmarks.tiny.train --minutes 96 --rate 4e-3 --compile --out RUN   # the backbone
    python -m benchmarks.tiny.mtp --minutes 7 --compile --out RUN                  # the draft head, backbone frozen
    python -m benchmarks.tiny.export RUN --out engine/tiny
    python -m benchmarks.tiny.evaluate                     # measures everything below and writes this file

The weights here are those of such a run, in which loss weights and the share of comparing word problems were raised on
the way (to what the code now says from the start), so a rerun gives a like model, not these bits.

## What it can do

Measured through the engine, greedy, on {problems} held-out problems per row. Held out means: the operands hash into a
twentieth (`benchmarks/tiny/problems.py: is_held_out`) that training never draws; no operands come twice in a row of
the table. Small talk has no operands: its questions are drawn like the training's. An answer is right if it is exactly
the expected text. Traces are median reasoning tokens.

| | effort high | trace | effort low | trace | effort none |
|---|---|---|---|---|---|
{rows}

The MTP head's first draft equals the model's own next greedy token at {mtp:.1%} of held-out positions.

## Reasoning matters

![accuracy against reasoning budget](budget.png)

`reasoning_budget` cuts the trace after exactly that many tokens and forces the answer. The curves are effort high on
{curve_problems} held-out problems each:

| category | accuracy at budget |
|---|---|
{curves}

## What it cannot do

Longer numbers than the table says, division, fractions, several steps in one question, and everything that is not
arithmetic: it says so in a sentence. It knows English arithmetic wordings of the kinds in `benchmarks/tiny/phrases.py`;
other wordings may confuse it. It is a test subject and a demonstration, not a calculator.

## How it talks (greedy, effort high)

{talk}
"""


def write_card(folder: Path, found: dict[str, Any]) -> None:
    """Write README.md, budget.png and evaluation.json beside the weights."""
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_curves(found, folder / "budget.png")
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    (folder / "README.md").write_text(
        HEAD.format(
            parameters=count_parameters(weights),
            size=weights.stat().st_size / 1e6,
            layers=len(config["hybrid_override_pattern"]),
            pattern=config["hybrid_override_pattern"],
            experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            problems=found["problems"],
            rows="\n".join(score_row(c, s) for c, s in found["scores"].items()),
            mtp=found["mtp_agreement"],
            curve_problems=max(20, found["problems"] // 2),
            curves="\n".join(curve_row(c, points) for c, points in found["curves"].items()),
            talk="\n".join(conversation(turns) for turns in found["talk"]),
        )
    )


def count_parameters(weights: Path) -> int:
    """Values in a safetensors file."""
    from safetensors import safe_open

    total = 0
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        for name in names:
            size = 1
            for n in file.get_slice(name).get_shape():
                size *= n
            total += size
    return total


def score_row(category: str, scores: dict[str, dict[str, float]]) -> str:
    """A line of the table of accuracies."""
    high, low, none = (scores[e] for e in ("high", "low", "none"))
    return (
        f"| {NAMES[category]} | {high['accuracy']:.1%} | {high['median_trace']:.0f} | {low['accuracy']:.1%} | "
        f"{low['median_trace']:.0f} | {none['accuracy']:.1%} |"
    )


def curve_row(category: str, points: list[list[float]]) -> str:
    """A line of the table of budgets."""
    return f"| {NAMES[category]} | " + ", ".join(f"{b:.0f}: {a:.0%}" for b, a in points) + " |"


def conversation(turns: list[dict[str, str | None]]) -> str:
    """A conversation as a block of text."""
    lines = ["```"]
    for turn in turns:
        lines += [f"> {turn['question']}", *(f"  ~ {line}" for line in (turn["reasoning"] or "").splitlines())]
        lines.append(turn["answer"] or "(no answer)")
    return "\n".join([*lines, "```"])


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Accuracy against budget, one line per category."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), dpi=130)
    for (category, points), marker in zip(found["curves"].items(), "osD^", strict=False):
        axes.plot([b for b, _ in points], [100 * a for _, a in points], marker=marker, label=NAMES[category])
    axes.set(xlabel="reasoning_budget (tokens)", ylabel="right answers (%)", ylim=(-3, 103))
    axes.set_title("headrace-tiny: accuracy against reasoning budget (held out, greedy)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
