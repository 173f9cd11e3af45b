"""``headrace inspect``: what a checkpoint is made of, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.engine.cli.common import UserError

if TYPE_CHECKING:
    from headrace.engine.cli.census import Census
    from headrace.engine.config import ModelConfig


def inspect(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Folder of a checkpoint; one with only its .json files will do.",
            show_default="the embedded model",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show layers, parameters, bytes, and what a token costs. Reads the headers of the files, not the weights."""
    from headrace.engine.cli.census import take_census
    from headrace.engine.config import ModelConfig
    from headrace.engine.engine import EMBEDDED_MODEL

    folder = EMBEDDED_MODEL if model is None else model
    try:
        config = ModelConfig.load(folder)
        census = take_census(folder, config)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if as_json:
        print(json.dumps(_document(config, census)))
    else:
        _print(config, census)


def _document(config: ModelConfig, census: Census) -> dict[str, Any]:
    return {
        "layers": config.pattern,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "parts": [
            {"name": part.name, "layers": part.layers, "parameters": part.parameters, "bytes": part.num_bytes}
            for part in census.parts
        ],
        "parameters": census.parameters,
        "bytes": census.num_bytes,
        "bytes_are_assumed": census.bytes_are_assumed,
        "active_parameters": census.active_parameters,
        "flops_per_token": census.flops_per_token,
        "bytes_read_per_token": census.bytes_read_per_token,
        "kv_bytes_per_token": census.kv_bytes_per_token,
        "kv_dtype": census.kv_dtype,
        "state_bytes_per_sequence": census.state_bytes_per_sequence,
    }


def _print(config: ModelConfig, census: Census) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"layers      {len(config.layers)}: {config.pattern}", markup=False)
    console.print(f"hidden      {config.hidden_size:,}, vocabulary {config.vocab_size:,}")
    console.print(f"context     {config.max_position_embeddings:,} tokens")
    if config.moe is not None:
        latent = f", latent {config.moe.latent_size:,}" if config.moe.latent_size else ""
        console.print(f"experts     {config.moe.top_k} of {config.moe.num_experts} per token{latent}, one shared")
    table = Table("part", box=None, pad_edge=False)
    for heading in ("layers", "parameters", "expected bytes" if census.bytes_are_assumed else "bytes"):
        table.add_column(heading, justify="right")
    for part in census.parts:
        table.add_row(part.name, str(part.layers or ""), f"{part.parameters:,}", size(part.num_bytes))
    table.add_row("all", str(len(config.layers)), f"{census.parameters:,}", size(census.num_bytes))
    console.print()
    console.print(table)
    console.print()
    console.print("One generated token (one sequence, no speculation; caches as on a GPU):")
    console.print(f"  active parameters   {census.active_parameters:,}")
    console.print(f"  arithmetic          {census.flops_per_token:,} FLOP")
    console.print(f"  weights read        {size(census.bytes_read_per_token)}")
    console.print(f"  KV cache            {size(census.kv_bytes_per_token)} per token of context, {census.kv_dtype}")
    console.print(
        f"  Mamba state         {size(census.state_bytes_per_sequence)} per sequence, read and written, float32"
    )


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1024."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
