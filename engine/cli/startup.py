"""What ``headrace serve`` says on stderr before it serves: where it runs, what it reads, what it sets aside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.engine.cli.inspect import size

if TYPE_CHECKING:
    from headrace.engine import Engine, EngineConfig


def loading_plan(model: str | None, config: EngineConfig) -> list[str]:
    """Lines for before the weights are read: the kernels, and the files' bytes by format, from their headers alone.

    Raises ValueError and OSError as loading does.
    """
    from headrace.engine.engine import EMBEDDED_MODEL, EMBEDDED_NAME
    from headrace.engine.model.weights.files import list_tensors
    from headrace.engine.naming import model_name

    folder = EMBEDDED_MODEL if model is None else Path(model)
    formats: Counter[str] = Counter()
    for entries in list_tensors(folder).values():
        for entry in entries:
            formats[entry.dtype] += entry.num_bytes
    listed = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in formats.most_common())
    return [
        f"model    {EMBEDDED_NAME if model is None else model_name(folder)}",
        f"device   {config.device}, {kernels(config)}",
        f"weights  {size(formats.total())}: {listed}",
    ]


def kernels(config: EngineConfig) -> str:
    """The kernels, and what they run on. Raises ValueError for instructions that this machine does not have."""
    if config.kernels != "native":
        return f"{config.kernels} kernels"
    from headrace.kernels.native.library import available_cores, choose_path

    threads = config.threads or available_cores()
    return f"native kernels ({choose_path(config.instructions)}), {threads} thread{'s' if threads > 1 else ''}"


def serving_plan(engine: Engine) -> list[str]:
    """Lines for when everything has its place. Padding rows have pages and slots beside those that requests get."""
    sizes = engine.sizes
    pages, slots = sizes.num_pages + sizes.padding, sizes.num_slots + sizes.padding
    beside = f", {sizes.padding} more for padding" if sizes.padding else ""
    return [
        f"pages    {sizes.num_pages:,} of {sizes.page_size} tokens{beside}: {size(pages * sizes.page_bytes)}",
        f"slots    {sizes.num_slots:,}{beside}: {size(slots * sizes.slot_bytes)} of Mamba state",
        f"context  {sizes.max_context:,} tokens at most; {engine.config.max_waiting:,} answers may wait",
    ]
