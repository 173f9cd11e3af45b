"""Attention: the same bits on every path and any number of threads; every number that a page can hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same_bits, scattered, seeded
from torch import Tensor

from headrace.kernels import attention as reference
from headrace.kernels.attention import Pages
from headrace.kernels.native.attention import decode_attention, prefill_attention
from headrace.kernels.native.library import Pool

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = (*BITS, torch.float8_e4m3fn)


def empty_pages(count: int, page_size: int, kv_heads: int, width: int, dtype: torch.dtype) -> Pages:
    keys, values = (torch.full((count, page_size, kv_heads, width), torch.nan).to(dtype) for _ in range(2))
    return Pages(keys, values, 0.5, 3.0) if dtype == torch.float8_e4m3fn else Pages(keys, values)


def bits(x: Tensor) -> Tensor:
    return x.view(BITS.get(x.dtype, torch.uint8))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    rows=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5, 16, 17, 40]),
    width=st.sampled_from([1, 8, 15, 16, 17, 33, 48, 64]),
    page_size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_a_prompt_and_its_next_tokens(
    pools: list[Pool],
    lengths: list[int],
    rows: int,
    kv_heads: int,
    group: int,
    width: int,
    page_size: int,
    dtype: torch.dtype,
) -> None:
    """Results and pages, to the bit, over all paths and threads; close to the reference's."""
    generator = seeded(sum(lengths) + rows)
    each = max(lengths) // page_size + rows + 1
    table = torch.randperm(len(lengths) * each, generator=generator).int().view(-1, each)
    total = sum(lengths) + len(lengths) * rows
    q = scattered(torch.randn(total, kv_heads * group, width, generator=generator))
    k, v = (scattered(torch.randn(total, kv_heads, width, generator=generator)) for _ in range(2))
    slots = torch.arange(len(lengths) - 1, -1, -1)

    def run(decode, prefill, **options: Pool) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        pages, out, at = empty_pages(table.numel(), page_size, kv_heads, width, dtype), [], len(lengths) * rows
        for slot, length in zip(slots.tolist(), lengths, strict=True):
            part, at = slice(at, at + length), at + length
            out.append(prefill(q[part], k[part], v[part], pages, table, slot, 0, 0.3, **options))
        new = slice(0, len(lengths) * rows)
        out.append(decode(q[new], k[new], v[new], pages, table, slots, torch.tensor(lengths), 0.3, rows, **options))
        return torch.cat(out), pages.keys, pages.values

    expected = run(decode_attention, prefill_attention, pool=pools[0])
    for pool in pools[1:]:
        for actual, first in zip(run(decode_attention, prefill_attention, pool=pool), expected, strict=True):
            assert torch.equal(bits(actual), bits(first))
    theirs = run(reference.decode_attention, reference.prefill_attention)
    torch.testing.assert_close(expected[0], theirs[0], rtol=1e-4, atol=1e-5)
    for mine, its in zip(expected[1:], theirs[1:], strict=True):
        assert_same_bits(mine.float(), its.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_written_and_read_as_torch_does(pools: list[Pool], dtype: torch.dtype) -> None:
    """A single token's attention is its value. All numbers of 16 bits and fewer, what lies between, and beyond."""
    steps = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = torch.cat([(steps << 16).view(torch.float32), ((steps << 16) + 0x8000).view(torch.float32)])
    if dtype != torch.float32:
        narrow = {torch.bfloat16: steps.to(torch.int16), torch.float16: steps.to(torch.int16)}
        every = narrow[dtype].view(dtype).float() if dtype in narrow else torch.arange(256).byte().view(dtype).float()
        ordered = every[every.isfinite()].unique()
        middle = ((ordered[1:].double() + ordered[:-1].double()) / 2).float()
        nudged = [torch.nextafter(middle, torch.tensor(end)) for end in (torch.inf, -torch.inf)]
        x = torch.cat([x, every, middle, *nudged])
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 1, 64)
    limit = torch.finfo(dtype).max
    expected = (x.clamp(-limit, limit) if dtype == torch.float8_e4m3fn else x).to(dtype)
    keys, values = (torch.zeros(len(x), 1, 1, 64, dtype=dtype) for _ in range(2))
    table, positions = torch.arange(len(x), dtype=torch.int32)[:, None], torch.zeros(len(x), dtype=torch.int64)
    for pool in pools:
        q, k = torch.zeros(2, len(x), 1, 64)
        slots = torch.arange(len(x))
        y = decode_attention(q, k, x, Pages(keys, values), table, slots, positions, 1.0, pool=pool)
        assert_same_bits(values.view(x.shape).float(), expected.float())
        assert_same_bits(y, expected.float())


def test_many_long_sequences_are_combined_in_passes(pools: list[Pool]) -> None:
    """More results of segments than are held at once: the same bits as one sequence at a time."""
    heads, width, length, count = 64, 256, 257, 600
    generator = seeded()
    q = torch.randn(count, heads, width, generator=generator)
    k, v = torch.randn(2, count, 1, width, generator=generator)
    # Pages of one token: all sequences share what they have read, and each has a page for its last token.
    keys, values = torch.randn(2, length + count, 1, 1, width, generator=generator)
    table = torch.arange(length - 1, dtype=torch.int32).repeat(count, 1)
    table = torch.cat([table, torch.arange(length, length + count, dtype=torch.int32)[:, None]], 1)
    slots, positions = torch.arange(count), torch.full((count,), length - 1)
    pages, pool = Pages(keys, values), pools[0]
    together = decode_attention(q, k, v, pages, table, slots, positions, 0.1, pool=pool)
    for i in (0, 299, count - 1):
        one = slice(i, i + 1)
        alone = decode_attention(q[one], k[one], v[one], pages, table, slots[one], positions[one], 0.1, pool=pool)
        assert_same_bits(together[one], alone)
