"""Every projection of the published model, bf16, with what is fused into it; those that are released in FP8 or NVFP4
also as these; the embedding and the last norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headrace.kernels.formats import Format
from headrace.kernels.lab.cases import Case
from headrace.kernels.norm import Norm
from headrace.kernels.triton import linear, norm

HIDDEN, VOCABULARY = 4096, 131_072
BATCHES = (1, 8, 32, 128)
TILES = (1, 32, 128)  # batches of other tiles
BF16, FP32, INT64 = 2, 4, 8  # bytes


@dataclass(frozen=True)
class Projection:
    name: str
    outputs: int
    inputs: int
    second: int = 0  # columns of the second input, to which relu2 is applied
    groups: int = 0  # of the norm; 0: none
    residual: bool = False
    relu2: bool = False
    format: Format = "float"

    @property
    def op(self) -> str:
        stored = "" if self.format == "float" else f", {self.format}"
        return f"linear {self.name} {self.outputs} x {self.inputs + self.second}{stored}"

    def make(self, batch: int) -> Callable[[], object]:
        packed = packed_weight(self.format, self.outputs, self.inputs + self.second)
        x = torch.empty(batch, self.inputs)
        inputs = (x, torch.empty(batch, self.second)) if self.second else x
        before = Norm(torch.empty(self.inputs), 1e-5, self.groups) if self.groups else None
        residual = torch.empty(batch, self.outputs) if self.residual else None
        return lambda: linear.linear(inputs, packed, norm=before, relu2=self.relu2, residual=residual)

    def minimum_bytes(self, batch: int) -> int:
        width = self.inputs + self.second
        rows = batch * FP32 * (width + self.outputs * (2 if self.residual else 1))
        weight = {
            "float": BF16 * self.outputs * width,
            "fp8": self.outputs * width,
            "nvfp4": self.outputs * width * 9 // 16,
        }
        scale = 0 if self.format == "float" else FP32 * self.outputs
        return weight[self.format] + scale + rows + (FP32 * width if self.groups else 0)


PROJECTIONS = (
    Projection("Mamba in", 18_560, HIDDEN, groups=1),
    Projection("Mamba out", HIDDEN, 8192, groups=8, residual=True),
    Projection("query, key, value", 4608, HIDDEN, groups=1),
    Projection("attention out", HIDDEN, HIDDEN, residual=True),
    Projection("MoE first", 6912, HIDDEN, groups=1),
    Projection("MoE last", HIDDEN, 1024, second=5376, relu2=True, residual=True),
    Projection("head", VOCABULARY, HIDDEN),
)
QUANTISED = (
    Projection("Mamba in", 18_560, HIDDEN, groups=1, format="fp8"),
    Projection("Mamba out", HIDDEN, 8192, groups=8, residual=True, format="fp8"),
    Projection("MoE last", HIDDEN, 1024, second=5376, relu2=True, residual=True, format="fp8"),
    Projection("shared up", 5376, HIDDEN, groups=1, format="nvfp4"),
    Projection("shared down", HIDDEN, 5376, relu2=True, residual=True, format="nvfp4"),
    Projection("head", VOCABULARY, HIDDEN, format="nvfp4"),
)


def packed_weight(form: Format, outputs: int, width: int) -> linear.PackedLinear:
    """Memory for a weight, never filled."""
    if form == "float":
        return linear.PackedLinear(torch.empty(outputs, width, dtype=torch.bfloat16), None)
    scale = torch.empty(outputs)
    if form == "fp8":
        return linear.PackedLinear(torch.empty(outputs, width, dtype=torch.uint8), None, scale)
    codes, blocks = (
        torch.empty(*size, dtype=torch.uint8) for size in ((outputs, width // 2), (width // 64, outputs, 4))
    )
    return linear.PackedLinear(codes, None, scale, blocks)


def linear_case(projection: Projection, batch: int) -> Case:
    return Case(
        name=f"{projection.op}, batch {batch}",
        op=projection.op,
        make=lambda: projection.make(batch),
        minimum_bytes=projection.minimum_bytes(batch),
        # 128 tokens of NVFP4 are two tiles side by side: the second one's weights come out of L2.
        most_bytes=1.9 if projection.format == "nvfp4" and batch > 64 else 1.02,
        streamed=("weight", "block_scales"),
        wide=("weight",),
        steps=("BLOCK_K", "GROUPS"),
        least_in_flight=20_000,
    )


def embed_case(batch: int) -> Case:
    def make() -> Callable[[], object]:
        weight = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
        token_ids = torch.arange(batch) * 1000
        return lambda: linear.embed(weight, token_ids)

    return Case(
        name=f"embed {HIDDEN}, batch {batch}",
        op=f"embed {HIDDEN}",
        make=make,
        minimum_bytes=batch * (INT64 + (BF16 + FP32) * HIDDEN),
        most_bytes=1.02,
        streamed=("weight", "out"),
        steps=("BLOCK",),
    )


def norm_case(batch: int) -> Case:
    def make() -> Callable[[], object]:
        x, last = torch.ones(batch, HIDDEN), Norm(torch.ones(HIDDEN), 1e-5)
        return lambda: norm.rms_norm(x, last)

    return Case(
        name=f"rms_norm {HIDDEN}, batch {batch}",
        op=f"rms_norm {HIDDEN}",
        make=make,
        minimum_bytes=FP32 * HIDDEN * (2 * batch + 1),
        streamed=("out",),
        steps=("SPAN", "BLOCK"),
    )


CASES = (
    *(linear_case(projection, batch) for projection in PROJECTIONS for batch in BATCHES),
    *(linear_case(projection, batch) for projection in QUANTISED for batch in TILES),
    *(case(batch) for case in (embed_case, norm_case) for batch in (1, 128)),
)
