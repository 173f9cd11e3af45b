"""States and hostile rows for the sampler's tests."""

from dataclasses import fields

import torch
from kernel_checks import seeded

from headrace.kernels.control import ControlIds
from headrace.kernels.sampling import SamplerState

NO_CONTROL = ControlIds(eos=())


def state_of(slots: int, **values) -> SamplerState:
    """``slots`` running slots with the given values; the rest are those of an unlimited, drawn request."""
    state = SamplerState.allocate(slots, torch.get_default_device())
    defaults = {"tokens_left": 10**6, "top_p": 1.0, "temperature": 1.0, "remaining": -1, "length": 5}
    for name, value in {**defaults, **values}.items():
        getattr(state, name)[:] = torch.as_tensor(value)
    return state


def copy_of(state: SamplerState) -> SamplerState:
    return SamplerState(**{field.name: getattr(state, field.name).clone() for field in fields(state)})


def rows_of(kind: str, rows: int, vocab: int) -> torch.Tensor:
    """Logits [rows, vocab] of a kind that is hard on a nucleus."""
    x = torch.randn(rows, vocab, generator=seeded(vocab))
    match kind:
        case "normal":
            return x * 3
        case "wide":  # most masses are 0
            return x * 40
        case "coarse":  # ties everywhere, at the threshold too
            return (x * 4).round() / 2
        case "equal":
            return x * 0 - 7
        case "nearly equal":  # distinct masses, all in one bucket
            return x * 1e-4
        case "certain":
            x[:, vocab // 3] = 60
            return x
        case "sparse":
            return torch.where(x > 1, x, -torch.inf).index_fill(1, torch.tensor([vocab - 1]), 0.5)
    raise ValueError(kind)
