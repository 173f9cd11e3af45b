"""``headrace plan``: whether a model fits a GPU, what is left for requests, and how fast a step could be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.engine.cli.common import UserError
from headrace.engine.cli.inspect import size

if TYPE_CHECKING:
    from rich.console import Console

    from headrace.engine.cli.planning import Plan

DOES_NOT_FIT = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """What does not fit."""

    why: str
    what_would: list[str]
    weights: dict[str, int]  # bytes of a device, by part


def plan(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of a checkpoint; one with only its .json files will do."),
    ],
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, rtx-pro-6000 or gb10.")] = "h200",
    tp: Annotated[int, typer.Option(help="GPUs that share the model: 1, 2, 4 or 8.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens of every sequence.", min=2)] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences that decode together.", min=1)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> int:
    """Predict memory and speed on a GPU, from the headers of the files; no weight is read.

    Status 1 if it does not fit.
    """
    from headrace.engine.cli.census import take_census
    from headrace.engine.cli.planning import GPUS, TP, Asked, DoesNotFit, device_weights, make_plan, what_would_fit
    from headrace.engine.config import ModelConfig

    if gpu not in GPUS:
        raise UserError(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    if tp not in TP:
        raise UserError(f"--tp must be one of {', '.join(map(str, TP))}, got {tp}")
    try:
        config = ModelConfig.load(model)
        if context > config.max_position_embeddings:
            raise UserError(f"--context {context} is more than the model's {config.max_position_embeddings}")
        census = take_census(model, config)
        found: dict[str, Plan | Refusal] = {}
        for mtp in [False, True] if config.mtp_layers else [False]:
            name = "with MTP" if mtp else "without MTP" if config.mtp_layers else "plan"
            asked = Asked(GPUS[gpu], tp, context, batch, mtp)
            try:
                found[name] = make_plan(config, census, asked)
            except DoesNotFit as error:
                changes = what_would_fit(config, census, asked)
                found[name] = Refusal(str(error), changes, device_weights(census, tp, mtp))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if as_json:
        print(json.dumps({name: document(result) for name, result in found.items()}))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"{GPUS[gpu].name}, {tp} of them, {batch} sequences of {context:,} tokens; predicted, not measured"
        )
        for name, result in found.items():
            console.print()
            show(console, name, result)
    return 0 if any(not isinstance(result, Refusal) for result in found.values()) else DOES_NOT_FIT


def document(result: Plan | Refusal) -> dict[str, Any]:
    """For machines. Bytes are of one device, seconds of one step."""
    if isinstance(result, Refusal):
        return {"fits": False, "why": result.why, "what_would": result.what_would, "weights": result.weights}
    from headrace.engine.cli.planning import RESERVED

    roof, sizes = result.roof, result.sizes
    return {
        "fits": True,
        "weights": result.weights,
        "reserved_bytes": RESERVED,
        "state_bytes": result.state_bytes,
        "page_bytes": result.page_bytes,
        "step_bytes": result.step_bytes,
        "slots": sizes.num_slots,
        "pages": sizes.num_pages,
        "kv_dtype": result.kv_dtype,
        "most_slots": result.most_slots,
        "most_pages": result.most_pages,
        "longest_context": result.longest_context,
        "step_seconds": roof.seconds,
        "limit": roof.limit,
        "seconds": {**roof.parts, "arithmetic": roof.arithmetic, "launches": roof.launches},
        "tokens_per_second": roof.tokens / roof.seconds,
    }


def show(console: Console, name: str, result: Plan | Refusal) -> None:
    """For people."""
    from rich.table import Table

    from headrace.engine.cli.planning import RESERVED

    memory = Table(name, box=None, pad_edge=False)
    memory.add_column("a device", justify="right")
    for part, num_bytes in result.weights.items():
        memory.add_row(part, size(num_bytes))
    if isinstance(result, Refusal):
        memory.add_row("all weights", size(sum(result.weights.values())))
        console.print(memory)
        console.print(f"does not fit: {result.why}", markup=False)
        console.print(
            f"  what would: {', or '.join(result.what_would) or 'nothing that is in the table'}", markup=False
        )
        return
    sizes, roof = result.sizes, result.roof
    memory.add_row(f"Mamba state, {sizes.num_slots} slots and {sizes.padding} for padding", size(result.state_bytes))
    pages = f"KV in {result.kv_dtype}, {sizes.num_pages:,} pages of {sizes.page_size} tokens"
    memory.add_row(pages, size(result.page_bytes))
    memory.add_row("a step's own tensors, at most", size(result.step_bytes))
    memory.add_row("reserved for the driver and libraries", size(RESERVED))
    taken = result.weight_bytes + result.state_bytes + result.page_bytes + result.step_bytes + RESERVED
    memory.add_row("left", size(result.gpu.memory - taken))
    console.print(memory)
    console.print(f"slots that fit with that context each: {result.most_slots:,}")
    console.print(f"pages that fit beside {sizes.num_slots} slots: {result.most_pages:,}")
    console.print(f"longest context of one sequence beside such slots: {result.longest_context:,} tokens")
    times = Table("a decode step, at best", box=None, pad_edge=False)
    times.add_column("ms", justify="right")
    for part, seconds in sorted(roof.parts.items(), key=lambda item: -item[1]):
        times.add_row(f"reading {part}", f"{seconds * 1e3:.2f}")
    times.add_row("arithmetic", f"{roof.arithmetic * 1e3:.2f}")
    times.add_row("launches", f"{roof.launches * 1e3:.2f}")
    console.print(times)
    console.print(
        f"limited by {roof.limit}: {roof.seconds * 1e3:.2f} ms a step, {roof.tokens / roof.seconds:,.0f} tokens/s"
    )
