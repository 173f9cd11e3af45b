"""Stored weights and their encoders, bit by bit, against ml_dtypes, compressed-tensors and trying all there is."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from kernel_checks import assert_same_bits, seeded
from torch import Tensor

from headrace.kernels.formats import E2M1, Fp8, Nvfp4, common_format, dequantised, format_of
from headrace.kernels.quantize import e2m1_codes, nearest, quantize_fp8, quantize_nvfp4

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
ONE = torch.tensor(1.0)


def all_nvfp4() -> Nvfp4:
    """Every code under every block scale: row s has block scale s, columns hold the codes 0..15."""
    codes = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8)
    return Nvfp4(codes.repeat(256, 1), E4M3[:, None], ONE)


def test_unscaled_nvfp4_is_exact():
    """All 16 x 256 products in rational numbers: bf16 holds each of them, the sign of zero too."""
    actual = all_nvfp4().unscaled()
    assert actual.dtype == torch.bfloat16
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    smallest, largest = math.inf, 0.0
    for bits, row in enumerate(actual.double().tolist()):
        for code, value in zip(codes, row, strict=True):
            if math.isnan(scales[bits]):
                assert math.isnan(value)
                continue
            exact = Fraction(float(code)) * Fraction(float(scales[bits]))
            assert Fraction(value) == exact
            assert math.copysign(1, value) == math.copysign(1, code) * math.copysign(1, scales[bits])
            if exact:
                smallest, largest = min(smallest, abs(value)), max(largest, abs(value))
    assert (smallest, largest) == (2**-10, 2688)


def test_unscaled_fp8_is_exact():
    actual = Fp8(E4M3[None], ONE).unscaled()
    assert actual.dtype == torch.bfloat16
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert_same_bits(actual[0].double(), torch.from_numpy(expected))
    assert_same_bits(actual[0].double().signbit(), torch.from_numpy(np.signbit(expected)) & ~torch.isnan(E4M3.float()))


def test_random_bytes_decode_as_ml_dtypes_says():
    """Any bytes, in the published layout: low nibble first, a scale for 16 columns, one for all."""
    generator = seeded()
    codes = torch.randint(0, 256, (5, 40), generator=generator, dtype=torch.uint8)
    blocks = torch.randint(0, 127, (5, 5), generator=generator, dtype=torch.uint8)
    weight = Nvfp4(codes, blocks.view(torch.float8_e4m3fn), torch.tensor(0.0371))
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(5, 80)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = blocks.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32).repeat(16, 1)
    assert_same_bits(weight.unscaled().float(), torch.from_numpy(values * scales))
    assert_same_bits(dequantised(weight), torch.from_numpy(values * scales * np.float32(0.0371)))
    assert (weight.shape, weight.format, weight.nbytes) == ((5, 80), "nvfp4", 5 * 40 + 5 * 5 + 4)


def test_compressed_tensors_reads_the_same():
    """The library by which others read these checkpoints: its packing, both ways, and its own conversion of ours."""
    weight = quantize_nvfp4(torch.randn(24, 64, generator=seeded()))
    values = weight.unscaled().float() / weight.block_scales.float().repeat_interleave(16, 1)
    assert_same_bits(unpack_fp4_from_uint8(weight.codes, 24, 64, torch.float32), values)
    assert_same_bits(pack_fp4_to_uint8(values.bfloat16()), weight.codes)
    stored = {"x.weight": weight.codes, "x.weight_scale": weight.block_scales, "x.weight_scale_2": weight.scale}
    theirs = ModelOptNvfp4Converter(targets=["x"]).validate(dict(stored))
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    read = NVFP4PackedCompressor.decompress({name.removeprefix("x."): t for name, t in theirs.items()}, scheme)
    # Theirs is bf16, and so is the product of the two scales before it.
    torch.testing.assert_close(read["weight"].float(), dequantised(weight), rtol=2**-7, atol=0)


def test_stacks_and_rows_are_views():
    stack = Nvfp4(
        torch.randint(0, 256, (3, 20, 16), generator=seeded(), dtype=torch.uint8),
        torch.randint(0, 120, (3, 20, 2), generator=seeded(1), dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.rand(3, generator=seeded(2)),
    )
    fp8 = Fp8(E4M3[:120].repeat(3, 8, 1), torch.rand(3, generator=seeded(3)))
    for weight in (stack, fp8):
        assert len(weight) == 3
        assert_same_bits(weight[1].unscaled(), weight.unscaled()[1])
        assert_same_bits(weight.rows(3, 7).unscaled(), weight.unscaled()[:, 3:7])
        assert_same_bits(dequantised(weight)[2], dequantised(weight[2]))
        assert weight[2].rows(1, 3).shape == (2, weight.shape[2])
    assert stack[1].codes.data_ptr() == stack.codes[1].data_ptr()


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: Fp8(torch.zeros(2, 3), ONE), ["values", "float8_e4m3fn", "float32"]),
        (lambda: Fp8(E4M3, ONE), ["values", "N and K", "[256]"]),
        (lambda: Fp8(E4M3[None], torch.ones(1)), ["scale", "[]", "[1]"]),
        (lambda: Fp8(E4M3[None], ONE.double()), ["scale", "float32", "float64"]),
        (lambda: Nvfp4(torch.zeros(2, 12, dtype=torch.uint8), E4M3[:4].view(2, 2), ONE), ["multiple of 16"]),
        (lambda: Nvfp4(torch.zeros(2, 16, dtype=torch.uint8), E4M3[:2].view(2, 1), ONE), ["block_scales", "[2, 2]"]),
        (lambda: Nvfp4(torch.zeros(2, 16), E4M3[:4].view(2, 2), ONE), ["codes", "uint8"]),
        (lambda: common_format([torch.ones(1, 1), Fp8(E4M3[None], ONE)]), ["float, fp8"]),
    ],
)
def test_what_does_not_fit_together_is_refused(make, fragments):
    with pytest.raises(ValueError) as error:
        make()
    for fragment in fragments:
        assert fragment in str(error.value)


# Encoders


def nasty_floats() -> Tensor:
    """Every middle between two e2m1 values, what lies right beside it, and more."""
    values = torch.tensor(E2M1)
    middles = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (0.0, math.inf)]
    more = torch.tensor([0.0, 1e-45, 1e-30, 5.9999, 6.0, 6.001, 7.0, 1e30, math.inf])
    positive = torch.cat([values, middles, *near, more, torch.rand(2000, generator=seeded()) * 7])
    return torch.cat([positive, -positive])


def test_codes_are_rounded_as_ml_dtypes_rounds():
    """Ties to even, saturation at 6, the sign of what became zero."""
    x = nasty_floats()
    expected = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert e2m1_codes(x).tolist() == expected.tolist()
    positive = x[~x.signbit()]
    assert_same_bits(nearest(positive.clone()), torch.tensor(E2M1)[e2m1_codes(positive).int()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_is_rounded_as_ml_dtypes_rounds(dtype):
    weight = (torch.randn(33, 70, generator=seeded()) * 0.02).to(dtype)
    made = quantize_fp8(weight)
    scale = np.float32(weight.float().abs().max().item() / 448)
    assert made.scale.item() == scale
    expected = (weight.float().numpy() / scale).astype(ml_dtypes.float8_e4m3fn)
    assert_same_bits(made.values.view(torch.uint8), torch.from_numpy(expected.view(np.uint8)))
    assert made.values.float().abs().max() == 448


def best_errors(blocks: Tensor) -> Tensor:
    """The least squared error of each block [n, 16] over every positive block scale, codes by ml_dtypes."""
    errors = []
    for scale in E4M3[1:127].double().tolist():
        codes = (blocks / scale).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
        errors.append((torch.from_numpy(codes) * scale - blocks).square().sum(-1))
    return torch.stack(errors).amin(0)


def spreads() -> dict[str, Tensor]:
    """Kinds of weights, [64, 64] each; the largest magnitude of each is 2688, so that the scale is 1."""
    generator = seeded(4)
    normal = torch.randn(64, 64, generator=generator)
    kinds = {
        "normal": normal,
        "heavy tails": normal**5,
        "uniform": torch.rand(64, 64, generator=generator) - 0.5,
        "one of each block": normal * 1e-2 + (torch.arange(64) % 16 == 5) * normal.sign(),
        "two sizes": torch.where(normal > 0, 1.0, 0.66) * normal.sign(),
        "blocks of every size": normal * torch.logspace(0, -6, 64)[:, None],
    }
    for weight in kinds.values():
        weight *= 2000 / weight.abs().max()
        weight[0, 0] = 2688
    return kinds


@pytest.mark.parametrize("kind", spreads())
def test_block_scales_are_the_best_of_all(kind):
    """As good as the best of all 126 scales."""
    weight = spreads()[kind]
    made = quantize_nvfp4(weight)
    assert made.scale == 1
    blocks = weight.double().view(-1, 16)
    error = (made.unscaled().double().view(-1, 16) - blocks).square().sum(-1)
    assert (error <= best_errors(blocks) * (1 + 1e-5) + 1e-12).all()
    assert (made.block_scales.float() > 0).all()


def test_a_stored_weight_is_its_own_encoding():
    """What a checkpoint holds survives being decoded and encoded again, if its blocks use their range."""
    codes = torch.randint(0, 256, (8, 32), generator=seeded(), dtype=torch.uint8)
    codes[:, ::8] = codes[:, ::8] & 0xF0 | 7  # a 6 in every block
    codes[0, 0] = 0x0F | 0x10
    bits = torch.randint(40, 126, (8, 4), generator=seeded(1), dtype=torch.uint8)
    bits[0, 0] = 126
    stored = Nvfp4(codes, bits.view(torch.float8_e4m3fn), torch.tensor(2.0**-9))
    again = quantize_nvfp4(dequantised(stored))
    assert_same_bits(again.unscaled(), stored.unscaled())
    assert again.scale == stored.scale
    assert_same_bits(again.unscaled().signbit(), stored.unscaled().signbit())


@pytest.mark.parametrize("make", [quantize_fp8, quantize_nvfp4])
def test_extremes(make):
    zeros = make(torch.tensor([[0.0, -0.0] * 16] * 3))
    assert zeros.scale == 1
    assert dequantised(zeros).eq(0).all() and dequantised(zeros)[0].signbit().tolist() == [False, True] * 16
    mixed = torch.zeros(4, 32)
    mixed[2, 3], mixed[2, 20] = -5.0, 1e-20
    made = dequantised(make(mixed))
    assert made[2, 3] == pytest.approx(-5, rel=1e-6) and made.count_nonzero() == 1
    for factor in (1e38, 1e-38, 1e-44):
        again = dequantised(make(torch.randn(2, 32, generator=seeded()).clamp(-3, 3) * factor))
        assert again.isfinite().all()
        assert (again.abs().max() > 0) == (factor > 1e-20)
    for poison in (math.nan, math.inf, -math.inf):
        weight = torch.ones(700, 512)
        weight[600, 7] = poison
        with pytest.raises(ValueError, match=r"\[700, 512\] holds values that are not finite"):
            make(weight)
    assert make(torch.ones(0, 16)).shape == (0, 16)


def test_odd_widths():
    with pytest.raises(ValueError, match=r"\[3, 24\]: K must be a multiple of 16"):
        quantize_nvfp4(torch.ones(3, 24))
    assert quantize_fp8(torch.ones(3, 7)).shape == (3, 7)
    assert format_of(quantize_fp8(torch.ones(3, 7))) == "fp8"
