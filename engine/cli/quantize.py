"""``headrace quantize``: a checkpoint of float weights becomes one of FP8 or NVFP4 weights, as the releases have them.

    nvfp4   routed experts NVFP4; Mamba in_proj and out_proj, shared experts and dense MLPs FP8
    fp8     all of these FP8

Attention, latent projections, router, convolution, norms, embedding, head and the MTP module stay as they are.
Nothing is calibrated: there are no ``input_scale`` tensors (weights only), and the KV cache is left alone.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from headrace.engine.cli.common import UserError
from headrace.engine.cli.inspect import size

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.engine.config import ModelConfig
    from headrace.engine.model.weights.writer import Writer
    from headrace.kernels.formats import Format, Quantised


class Target(StrEnum):
    """What ``--format`` takes."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint with float weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must be empty, or not exist.")],
    target: Annotated[Target, typer.Option("--format", help="Of the routed experts.")] = Target.NVFP4,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Modules that stay as they are: 'layers.0', '*shared_experts'. Repeatable."
        ),
    ] = None,
) -> None:
    """Write a quantised copy of a checkpoint, and say how far each layer's weights moved."""
    try:
        report = quantize_checkpoint(model, out, target.value, keep or [], progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    _print(report)


STORED_AS = {"fp8": ("weight", "weight_scale"), "nvfp4": ("weight", "weight_scale", "weight_scale_2")}
"""Names of a weight's tensors, in the order of ``formats.tensors_of``."""

OTHER_WEIGHTS = {
    *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "npz"),
}
"""Parts of the names of files that hold the float weights once more, or an index of those; they are not copied."""

ROWS = 256
"""Of a matrix, that are compared at a time: in float64 the whole of it may not fit."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One module, and how far it moved."""

    weight: Quantised
    squared: float  # sum of w^2
    squared_error: float


@dataclass
class Moved:
    """What became of a layer's modules of one format."""

    matrices: int = 0
    squared: float = 0.0
    squared_error: float = 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the difference over norm of the weights; 0 for weights of zeros."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0


@dataclass
class Report:
    """What a run did."""

    bytes_before: int = 0
    bytes_after: int = 0
    layers: dict[str, dict[Format, Moved]] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)  # modules that NVFP4 cannot hold

    def add(self, module: str, encoded: Encoded) -> None:
        """One more module."""
        layer = self.layers.setdefault(module.partition(".mixer.")[0], {})
        moved = layer.setdefault(encoded.weight.format, Moved())
        moved.matrices += 1
        moved.squared += encoded.squared
        moved.squared_error += encoded.squared_error


def quantize_checkpoint(
    model: Path,
    out: Path,
    target: Format,
    keep: Sequence[str] = (),
    *,
    max_shard_bytes: int | None = None,
    progress: bool = False,
) -> Report:
    """Read ``model`` tensor by tensor, write ``out``, which has that name once it is whole.

    Raises ValueError (CheckpointError, ConfigError) for a checkpoint that cannot be read, is quantised already or has
    nothing to quantise, for patterns that match nothing, and for an ``out`` that holds something; OSError for what
    cannot be written.
    """
    from headrace.engine.config import ModelConfig
    from headrace.engine.model.weights.names import places
    from headrace.engine.model.weights.writer import MAX_SHARD_BYTES, Writer
    from headrace.engine.quantization import HF_QUANT_CONFIG, write_quantization

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder")
    config = ModelConfig.load(model)
    if config.quantization is not None:
        raise ValueError(f"{model} is quantised already: {', '.join(sorted(config.quantization.formats))}")
    chosen, unfit = choose(config, target, keep)
    if not chosen:
        raise ValueError(f"{model} has no module that {target} would be for")
    inside, beside = write_quantization({published_name(name): form for name, form in chosen.items()}, _version())
    document = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"quantization_config": inside}
    places(ModelConfig.from_json(document, beside))  # refuses what could not be loaded
    report = Report(unfit=unfit)
    with _whole_folder(out) as folder:
        writer = Writer(folder, max_shard_bytes or MAX_SHARD_BYTES)
        _write_tensors(model, config, chosen, writer, report, progress)
        for file in sorted(model.iterdir()):
            if file.is_file() and not OTHER_WEIGHTS & set(file.name.lower().split(".")[1:]):
                shutil.copyfile(file, folder / file.name)
        (folder / HF_QUANT_CONFIG).write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return report


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, to be written inside the context; then it is ``out``; after an error, nothing."""
    out = out.resolve()
    if out.is_mount():
        raise ValueError(f"{out} is where a file system is mounted; OUT must be a folder in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()  # it is empty; not every system renames onto a folder
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def choose(config: ModelConfig, target: Format, keep: Sequence[str] = ()) -> tuple[dict[str, Format], list[str]]:
    """(module -> its format, modules that NVFP4 cannot hold), by the recipe at the head of this file.

    The experts of a layer go together. Raises ValueError for a pattern that keeps nothing.
    """
    from headrace.engine.model.weights.names import modules
    from headrace.engine.quantization import covers
    from headrace.kernels.formats import BLOCK

    linear = modules(config)
    chosen = {name: form for name in linear if (form := _recipe(name, target)) is not None}
    for pattern in keep:
        kept = [name for name in chosen if covers(pattern, name) or covers(pattern, published_name(name))]
        if not kept:
            raise ValueError(f"--keep {pattern!r} means no module that would be quantised")
        for name in kept:
            del chosen[name]
    narrow = {
        name.partition(".experts.")[0] for name, form in chosen.items() if form == "nvfp4" and linear[name][1] % BLOCK
    }
    unfit = {name for name, form in chosen.items() if form == "nvfp4" and name.partition(".experts.")[0] in narrow}
    fit = {name: form for name, form in chosen.items() if name not in unfit}
    return fit, [name for name in chosen if name in unfit]


def _recipe(module: str, target: Format) -> Format | None:
    layer, _, part = module.partition(".mixer.")
    if not part or layer.startswith("mtp."):
        return None
    if part.startswith("experts."):
        return target
    return (
        "fp8" if part.startswith("shared_experts.") or part in ("in_proj", "out_proj", "up_proj", "down_proj") else None
    )


def published_name(name: str) -> str:
    """With the prefix that the releases' files have."""
    from headrace.engine.model.weights.loader import UNPREFIXED

    return name if f"{name}.".startswith(UNPREFIXED) else f"backbone.{name}"


def _write_tensors(
    model: Path, config: ModelConfig, chosen: dict[str, Format], writer: Writer, report: Report, progress: bool
) -> None:
    from torch import Tensor

    from headrace.engine.model.weights import open_weights
    from headrace.engine.model.weights.names import places
    from headrace.kernels.formats import tensors_of

    queue: deque[tuple[str, Tensor | Future[Encoded]]] = deque()  # in the order of the files

    def write_first() -> None:
        file_name, item = queue.popleft()
        if isinstance(item, Tensor):
            writer.add(published_name(file_name), item)
            return
        encoded, module = item.result(), file_name.removesuffix(".weight")
        report.add(module, encoded)
        for part, stored in zip(STORED_AS[encoded.weight.format], tensors_of(encoded.weight), strict=True):
            writer.add(published_name(f"{module}.{part}"), stored)

    with open_weights(model, config, progress=progress) as weights, _encoders() as (pool, ahead):
        name, value = "", cast(Any, None)
        for file_name, place in places(config).items():
            if place.name != name:
                name, value = place.name, weights[place.name]
            tensor = value if place.row is None else value[place.row]
            assert isinstance(tensor, Tensor), "the configuration has no quantisation"
            report.bytes_before += tensor.nbytes
            form = chosen.get(file_name.removesuffix(".weight"))
            where = f"{model}: tensor {file_name!r}"
            queue.append((file_name, tensor if form is None else pool.submit(_encode, where, tensor, form)))
            if len(queue) > ahead:
                write_first()
        while queue:
            write_first()
        writer.finish()
        report.bytes_after = writer.total_bytes


@contextmanager
def _encoders() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """(threads that encode a matrix each, how many tensors may wait). torch's own spin while they wait for others."""
    import torch

    from headrace.kernels.native.library import available_cores

    before, cores = torch.get_num_threads(), available_cores()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool, 2 * cores
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _encode(where: str, original: Tensor, form: Format) -> Encoded:
    from headrace.kernels.formats import dequantised
    from headrace.kernels.quantize import quantize_fp8, quantize_nvfp4

    try:
        weight: Quantised = quantize_fp8(original) if form == "fp8" else quantize_nvfp4(original)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    squared = squared_error = 0.0
    for first in range(0, original.shape[0], ROWS):
        before = original[first : first + ROWS].double()
        moved = dequantised(weight.rows(first, first + ROWS)).double() - before
        squared, squared_error = squared + float(before.square().sum()), squared_error + float(moved.square().sum())
    return Encoded(weight, squared, squared_error)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table("layer", box=None, pad_edge=False)
    forms: list[Format] = ["nvfp4", "fp8"]
    for form in forms:
        table.add_column(f"{form} matrices", justify="right")
        table.add_column("relative error", justify="right")
    for name, layer in report.layers.items():
        cells = []
        for form in forms:
            moved = layer.get(form)
            cells += ["", ""] if moved is None else [str(moved.matrices), f"{moved.relative_error:.4f}"]
        table.add_row(name, *cells)
    console.print(table)
    if report.unfit:
        console.print(f"kept as they are, since their widths are no multiples of 16: {', '.join(report.unfit)}")
    share = report.bytes_after / report.bytes_before
    console.print(f"{size(report.bytes_before)} became {size(report.bytes_after)} ({share:.0%})")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"
