"""The sampler over the published vocabulary of 131072: every row drawn from a nucleus, the dearest usual request."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headrace.kernels.control import ControlIds
from headrace.kernels.lab.cases import Case, Sample
from headrace.kernels.lab.launches import Launch
from headrace.kernels.sampling import SamplerState
from headrace.kernels.triton.sampling import sample

VOCAB = 131072
BATCHES = (1, 8, 32, 128)
CONTROL = ControlIds(eos=(2, 11), think=12, end_think=13, tool_call=14, closing=(1010, 1046, 13))


def drawing(rows: int) -> SamplerState:
    """Slots of requests at temperature 1 and top_p 0.95, the model's recommendation."""
    state = SamplerState.allocate(rows, "cpu")
    state.temperature[:] = 1.0
    state.top_p[:] = 0.95
    state.tokens_left[:] = 1000
    state.seed[:] = torch.arange(rows)
    return state


def sample_case(rows: int) -> Case:
    """Only one row is executed: neither a launch parameter nor a program's work depends on how many there are."""

    def make() -> Callable[[], object]:
        # A spread of 3 nats leaves no tile without a kept token: all three passes are complete.
        x = (
            3 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
            if rows == 1
            else torch.empty(rows, VOCAB)
        )
        state = drawing(rows)
        return lambda: sample(x, torch.arange(rows), state, CONTROL)

    return Case(
        name=f"sample {VOCAB}, batch {rows}",
        op=f"sample {VOCAB}",
        make=make,
        minimum_bytes=VOCAB * 4 if rows == 1 else None,
        most_bytes=3.1,  # three passes, a histogram of 8 KB, the list of undecided tokens
        streamed=("logits",),
        steps=("TILE", "TILES"),
        sample=whole_grid,
    )


def whole_grid(launch: Launch) -> Sample:
    """Every tile: the row's last program concludes what all of them found."""
    return {(tile, 0, 0): 1.0 for tile in range(launch.grid[0])}


def everything_case(rows: int) -> Case:
    """With a mask and log-probabilities; compiled only."""

    def make() -> Callable[[], object]:
        x, mask, state = torch.empty(rows, VOCAB), torch.empty(rows, VOCAB, dtype=torch.bool), drawing(rows)
        return lambda: sample(x, torch.arange(rows), state, CONTROL, mask=mask, logprobs=True, top_logprobs=20)

    return Case(
        name=f"sample {VOCAB} with a mask and top 20, batch {rows}",
        op=f"sample {VOCAB} with a mask and top 20",
        make=make,
        steps=("TILE", "TILES", "RANKS"),
    )


CASES = (*map(sample_case, BATCHES), everything_case(1), everything_case(128))
