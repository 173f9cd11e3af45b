"""The sampler under the sanitizer: programs in any order, no access out of bounds, no race, nothing undefined."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from sampling_cases import copy_of, rows_of, state_of

from headrace.kernels import sampling as reference
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.lab.sanitizer import sanitize
from headrace.kernels.triton.sampling import sample


@pytest.mark.parametrize("order", ["shuffle", "reverse"])
@pytest.mark.parametrize("kind", ["normal", "nearly equal"])
def test_the_sampler_is_clean(kind, order):
    rows, vocab = 8, 1003
    logits = rows_of(kind, rows, vocab)
    logits[5, 3] = torch.nan
    mask = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(0)) < 0.8
    state = state_of(
        rows,
        temperature=torch.tensor([0, 0.5, 1, 1, 2, 1, 1, 1]),
        top_p=torch.tensor([0.5, 0.9, 0.95, 1, 0.5, 0.3, 0.7, 0], dtype=torch.float64),
        seed=torch.arange(rows),
        phase=int(Phase.THINKING),
        remaining=torch.tensor([-1, -1, 0, 1, 2, -1, -1, -1]),
        finish=torch.tensor([Finish.NONE] * 6 + [Finish.STOP, Finish.NONE]),
    )
    control, other = ControlIds(eos=(1,), think=2, end_think=3, closing=(4, 3)), copy_of(state)
    with sanitize(order=order):
        out = sample(logits, torch.arange(rows), state, control, mask=mask, logprobs=True, top_logprobs=3)
    expected = reference.sample(logits, torch.arange(rows), other, control, mask=mask)
    assert out.tokens.tolist() == expected.tokens.tolist()
    assert all(torch.equal(getattr(state, field.name), getattr(other, field.name)) for field in fields(state))
