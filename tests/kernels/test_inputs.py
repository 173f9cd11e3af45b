"""What opens a step: tokens and positions of the right slots, and a page table changed where it was to be changed."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_same_bits, seeded

SLOTS, PAGES = 7, 5
GARBAGE = -(10**9)


@dataclass(frozen=True)
class Case:
    decodes: int = 0
    prompts: int = 0
    writes: int = 0


CASES = [
    Case(), Case(1), Case(0, 1), Case(0, 0, 1), Case(7), Case(3, 1, 4), Case(2, 130, 1), Case(7, 300, 35), Case(1, 127),
    Case(0, 0, 35), Case(1, 128, 2), Case(7, 121),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_step_inputs(kernels, case, strided):
    generator = seeded()
    last_token = torch.randint(0, 131_072, (SLOTS,), generator=generator)
    length = torch.randint(1, 2**40, (SLOTS,), generator=generator)
    slots = torch.randperm(SLOTS, generator=generator)[: case.decodes]
    prompt_ids = torch.randint(0, 131_072, (case.prompts,), generator=generator)
    table = torch.full((SLOTS, PAGES), GARBAGE, dtype=torch.int32)
    where = torch.randperm(SLOTS * PAGES, generator=generator)[: case.writes]
    writes = torch.stack([where // PAGES, where % PAGES, torch.randint(0, 9999, where.shape, generator=generator)], 1)
    expected = table.clone()
    for slot, index, page in writes.tolist():
        expected[slot, index] = page

    if strided:
        last_token, length, slots, prompt_ids = (spread(x) for x in (last_token, length, slots, prompt_ids))
        writes = spread(writes)
        table = spread(table)
    token_ids, positions = kernels.step_inputs(last_token, length, slots, prompt_ids, table, writes)
    assert_same_bits(token_ids, torch.cat([last_token[slots], prompt_ids]))
    assert_same_bits(positions, length[slots] - 1)
    assert_same_bits(table, expected)


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second of the last dimension, other numbers between them."""
    memory = torch.full((*x.shape, 2), GARBAGE, dtype=x.dtype)
    memory[..., 0] = x
    return memory[..., 0]
