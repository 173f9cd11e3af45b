"""What the kernel tests share: closeness to a float64 result, equality of bits, numbers of threads, nasty memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.kernels.formats import Format, Fp8, Nvfp4, Weight, tensors_of
from headrace.kernels.quantize import quantize_fp8, quantize_nvfp4

THREADS = (1, 2, 3)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the device that the test runs on."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


def stored_as(form: Format, weight: Tensor) -> Weight:
    """A matrix, or a stack of them, in a format; each of a stack is encoded by itself."""
    if form == "float":
        return weight
    if weight.dim() == 2:
        return quantize_fp8(weight) if form == "fp8" else quantize_nvfp4(weight)
    parts = zip(*(tensors_of(stored_as(form, matrix)) for matrix in weight), strict=True)
    return (Fp8 if form == "fp8" else Nvfp4)(*(torch.stack(part) for part in parts))


def exact_weight(weight: Weight) -> Tensor:
    """In float64, what is stored."""
    if isinstance(weight, Tensor):
        return weight.double()
    return weight.unscaled().double() * weight.scale.double()[..., None, None]


def assert_close(actual: Tensor, expected: Tensor, terms: int = 1) -> None:
    """fp32 against a float64 result that is a sum of ``terms`` products.

    The error is taken relative to the larger of |expected| and the result's root mean square. Rounding is a random
    walk of ``terms`` steps of 2^-24; 16 of those lengths is beyond any walk and far below any wrong term.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    if not actual.numel():
        return
    expected = expected.double()
    scale = torch.maximum(expected.abs(), expected.square().mean().sqrt()).clamp(min=1e-30)
    error = (actual.double() - expected).abs() / scale
    bound = 16 * 2**-24 * max(terms, 1) ** 0.5
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error[worst] <= bound, f"relative error {float(error[worst]):.2e} > {bound:.2e} at {worst}"


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the last bit (NaN equals NaN)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    different = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    assert not different.any(), f"{int(different.sum())} of {different.numel()} elements differ"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_for_all_threads(compute: Callable[[], Tensor]) -> Tensor:
    """The result, which must not depend on the number of threads."""
    with threads(1):
        expected = compute()
    for count in THREADS[1:]:
        with threads(count):
            assert_same_bits(compute(), expected)
    return expected


def scattered(x: Tensor, offset: int = 3) -> Tensor:
    """The same values as a strided view into unaligned memory full of NaN."""
    width = x.shape[-1]
    memory = torch.full((*x.shape[:-1], width + 2 * offset), torch.nan, dtype=x.dtype)
    view = memory[..., offset : offset + width]
    view.copy_(x)
    return view
