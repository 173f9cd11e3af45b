"""Weights as checkpoints store them: floats, FP8 with one scale, NVFP4 with a scale for every 16 columns.

    FP8     W = e4m3 * scale
    NVFP4   W[n, k] = e2m1(code[n, k]) * e4m3(block_scales[n, k // 16]) * scale

What stands before ``scale`` is the *unscaled* weight. It is exact in bf16: an e4m3 value has 4 significant bits, its
product with an e2m1 value 6, between 2^-10 and 2688 (bf16 holds 8). So a backend may multiply with it on the units it
has for bf16, and every backend keeps one contract: y = scale * (x @ unscaled^T), the fp32 scale on the finished fp32
sum, before bias and residual.

Source: OCP microscaling formats 1.0 (e2m1), OCP FP8 (e4m3, no infinities, saturating at 448), and the tensors of
modelopt's checkpoints (``weight``, ``weight_scale``, ``weight_scale_2``). ``kernels.quantize`` makes such weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Format = Literal["float", "fp8", "nvfp4"]
"""How a weight is stored; "float" is a plain tensor of fp32, bf16 or fp16."""

BLOCK = 16
"""Columns that share one block scale of an NVFP4 weight."""

NAN = 0x7F
"""The one magnitude of e4m3 that is no number, below the sign."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0..7; the codes 8..15 are the same with a minus (8 is -0)."""


class NotANumber(ValueError):
    """A quantised weight that holds NaN; the message has its ``origin``."""

    def __init__(self, weight: Quantised) -> None:
        super().__init__(f"{weight.origin}{': ' if weight.origin else ''}an {weight.format} weight holds NaN")


@dataclass(frozen=True, slots=True)
class Fp8:
    """One matrix, or a stack of them. Raises ValueError if dtypes or shapes do not fit together."""

    values: Tensor  # [..., N, K] float8_e4m3fn
    scale: Tensor  # [...] fp32, one per matrix
    origin: str = ""  # file and tensor, for errors

    def __post_init__(self) -> None:
        _check("values", self.values, torch.float8_e4m3fn)
        _check("scale", self.scale, torch.float32, self.values.shape[:-2])

    @property
    def format(self) -> Format:
        return "fp8"

    @property
    def shape(self) -> torch.Size:
        """[..., N, K]."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Of everything that is stored."""
        return self.values.nbytes + self.scale.nbytes

    def unscaled(self) -> Tensor:
        """[..., N, K] bf16; exact."""
        return self.values.to(torch.bfloat16)

    def __len__(self) -> int:
        """Matrices of a stack."""
        return self.scale.shape[0]

    def __getitem__(self, index: int) -> Fp8:
        """A matrix of a stack."""
        return Fp8(self.values[index], self.scale[index])

    def rows(self, first: int, end: int) -> Fp8:
        """The same with outputs first..end - 1 only; a view."""
        return Fp8(self.values[..., first:end, :], self.scale)

    def to(self, device: torch.device | str) -> Fp8:
        return Fp8(self.values.to(device), self.scale.to(device), self.origin)


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """One matrix, or a stack of them. Raises ValueError if dtypes or shapes do not fit together.

    Byte j of a row holds the codes of columns 2j (low four bits) and 2j + 1. A code: the sign in bit 3, the index of
    its magnitude in ``E2M1`` below.
    """

    codes: Tensor  # [..., N, K / 2] uint8
    block_scales: Tensor  # [..., N, K / 16] float8_e4m3fn
    scale: Tensor  # [...] fp32, one per matrix
    origin: str = ""  # file and tensor, for errors

    def __post_init__(self) -> None:
        _check("codes", self.codes, torch.uint8)
        if self.codes.shape[-1] % (BLOCK // 2):
            raise ValueError(f"codes {list(self.codes.shape)}: K must be a multiple of {BLOCK}")
        blocks = (*self.codes.shape[:-1], self.codes.shape[-1] // (BLOCK // 2))
        _check("block_scales", self.block_scales, torch.float8_e4m3fn, torch.Size(blocks))
        _check("scale", self.scale, torch.float32, self.codes.shape[:-2])

    @property
    def format(self) -> Format:
        return "nvfp4"

    @property
    def shape(self) -> torch.Size:
        """[..., N, K]."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of everything that is stored."""
        return self.codes.nbytes + self.block_scales.nbytes + self.scale.nbytes

    def unscaled(self) -> Tensor:
        """[..., N, K] bf16; exact."""
        pairs = _pairs(self.codes.device).index_select(0, self.codes.flatten().int())
        blocks = pairs.view(*self.block_scales.shape, BLOCK)
        return (blocks * self.block_scales.to(torch.bfloat16)[..., None]).view(self.shape)

    def __len__(self) -> int:
        """Matrices of a stack."""
        return self.scale.shape[0]

    def __getitem__(self, index: int) -> Nvfp4:
        """A matrix of a stack."""
        return Nvfp4(self.codes[index], self.block_scales[index], self.scale[index])

    def rows(self, first: int, end: int) -> Nvfp4:
        """The same with outputs first..end - 1 only; a view."""
        return Nvfp4(self.codes[..., first:end, :], self.block_scales[..., first:end, :], self.scale)

    def to(self, device: torch.device | str) -> Nvfp4:
        return Nvfp4(self.codes.to(device), self.block_scales.to(device), self.scale.to(device), self.origin)


Quantised: TypeAlias = Fp8 | Nvfp4
Weight: TypeAlias = Tensor | Fp8 | Nvfp4
"""[N, K], logically; a stack of experts' has [E, N, K]."""


def format_of(weight: object) -> Format:
    """Of a ``Weight``, or of any ``moe.Matrices``: its ``format``; what has none is of floats."""
    found: Format = getattr(weight, "format", "float")
    return found


def common_format(weights: Sequence[object]) -> Format:
    """The one format of all weights. Raises ValueError naming them if there are several."""
    formats = [format_of(weight) for weight in weights]
    if len(set(formats)) != 1:
        raise ValueError(f"one packed weight must have one format, got {', '.join(formats)}")
    return formats[0]


def tensors_of(weight: Weight) -> tuple[Tensor, ...]:
    """What a weight is stored as: (itself,), (values, scale) or (codes, block_scales, scale)."""
    if isinstance(weight, Tensor):
        return (weight,)
    if isinstance(weight, Fp8):
        return weight.values, weight.scale
    return weight.codes, weight.block_scales, weight.scale


def check_numbers(weight: Weight) -> None:
    """Raises NotANumber if a quantised weight's e4m3 part (values or block scales) holds NaN. Reads it whole."""
    if isinstance(weight, Tensor):
        return
    e4m3 = weight.values if isinstance(weight, Fp8) else weight.block_scales
    if bool(((e4m3.view(torch.uint8) & NAN) == NAN).any()):
        raise NotANumber(weight)


def dequantised(weight: Weight) -> Tensor:
    """[..., N, K] fp32: the unscaled weight times its scale, rounded once."""
    if isinstance(weight, Tensor):
        return weight.float()
    return weight.unscaled().float() * weight.scale[..., None, None]


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] bf16: the two values of every byte of codes."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack([values[codes & 15], values[codes >> 4]], 1)


def _check(field: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size | None = None) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{field} must be {dtype}, got {tensor.dtype}")
    if shape is None and tensor.dim() < 2:
        raise ValueError(f"{field} must have N and K, got {list(tensor.shape)}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{field} must be {list(shape)}, got {list(tensor.shape)}")
