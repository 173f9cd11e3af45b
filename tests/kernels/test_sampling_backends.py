"""A backend's sampler against the reference: the same tokens for the same seeds, and the same states, one by one."""

from dataclasses import asdict, fields

import pytest
import torch
from kernel_checks import assert_same_bits, scattered, seeded
from sampling_cases import NO_CONTROL, copy_of, rows_of, state_of

from headrace.kernels import sampling as reference
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.sampling import SamplerState

TEMPERATURES = [0.0, 1e-38, 1e-6, 0.3, 1.0, 1.5, 1e4, 1e30]
TOP_PS = [0.0, 1e-9, 0.1, 0.5, 0.9, 0.999999, 1 - 2**-53, 1.0]
ROUNDING = 4e-6  # relative; exp of numbers down to -27 by a fast 2^x
KINDS = ["normal", "wide", "coarse", "equal", "nearly equal", "certain", "sparse"]


@pytest.fixture(autouse=True)
def another_backend(kernels):
    if kernels.backend == "reference":
        pytest.skip("the reference is what backends are compared with")


def grid_of_parameters(seed: int) -> dict[str, torch.Tensor]:
    """A row for every temperature and top_p, each with a seed and a position of its own."""
    temperature, top_p = torch.meshgrid(torch.tensor(TEMPERATURES), torch.tensor(TOP_PS), indexing="ij")
    rows = temperature.numel()
    return {
        "temperature": temperature.flatten(),
        "top_p": torch.tensor(TOP_PS, dtype=torch.float64).repeat(len(TEMPERATURES)),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=seeded(seed)),
        "length": torch.randint(0, 2**40, (rows,), generator=seeded(seed + 1)),
        "choice": torch.arange(rows) % 5,
    }


def assert_equal_states(actual: SamplerState, expected: SamplerState) -> None:
    for field in fields(SamplerState):
        got, wanted = getattr(actual, field.name), getattr(expected, field.name)
        assert torch.equal(got, wanted), f"{field.name}: {got.tolist()}, not {wanted.tolist()}"


def assert_same_decisions(kernels, logits, slots, state, control, **options) -> reference.Sampled:
    """Tokens, phases, ends, log-probabilities and all state arrays; returns what the backend decided."""
    other = copy_of(state)
    expected = reference.sample(logits, slots, other, control, **options)
    actual = kernels.sample(logits, slots, state, control, **options)
    for name in ("tokens", "phases", "finish"):
        assert getattr(actual, name).tolist() == getattr(expected, name).tolist(), name
    assert_equal_states(state, other)
    decided = expected.tokens >= 0
    if options.get("logprobs") or options.get("top_logprobs"):
        assert torch.allclose(actual.logprobs[decided], expected.logprobs[decided], rtol=1e-6, atol=1e-6)
    if options.get("top_logprobs"):
        assert torch.equal(actual.top_ids[decided], expected.top_ids[decided])
        assert torch.allclose(actual.top_logprobs[decided], expected.top_logprobs[decided], rtol=1e-6, atol=1e-6)
    return actual


def could_go_either_way(logits, temperature, top_p, noise, tokens) -> bool:
    """Whether one of the two tokens lies at the threshold of the nucleus, or their scores tie, within rounding.

    An exp may be off by ROUNDING of itself, and so the order of almost equal masses, and the noise by as much.
    """
    scaled = (logits.double() - logits.max()) / temperature.double()
    p = scaled.softmax(-1)
    for token in tokens:
        above = p[p > p[token] * (1 + ROUNDING)].sum() - ROUNDING
        at_least = p[p > p[token] * (1 - ROUNDING)].sum() + ROUNDING
        if above < top_p <= at_least:
            return True
    scores = (scaled + noise)[tokens]
    return bool((scores[0] - scores[1]).abs() < ROUNDING * 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_for_the_same_seeds(kernels, kind):
    """A row for every temperature and top_p. Tokens may differ only where rounding decides, in almost equal rows."""
    values = grid_of_parameters(KINDS.index(kind))
    vocab = 1000 if kind in ("normal", "nearly equal") else 500  # one tile or two
    logits = rows_of(kind, len(values["seed"]), vocab)
    slots = torch.randperm(len(logits), generator=seeded(5))
    state = state_of(len(logits), **{name: value[slots.argsort()] for name, value in values.items()})
    expected = reference.sample(logits, slots, copy_of(state), NO_CONTROL).tokens
    tokens = kernels.sample(logits, slots, state, NO_CONTROL).tokens
    different = torch.nonzero(tokens != expected)[:, 0].tolist()
    noise = reference.gumbel(values["seed"], values["length"], values["choice"], vocab)
    for row in different:
        pair = torch.stack([tokens[row], expected[row]])
        assert could_go_either_way(logits[row], values["temperature"][row], values["top_p"][row], noise[row], pair), row
    assert len(different) <= (2 if kind == "nearly equal" else 0)


def test_usual_rows_agree_without_exception(kernels):
    rows = 200
    values = {
        "temperature": torch.rand(rows, generator=seeded(1)) * 1.5 + 0.1,
        "top_p": torch.rand(rows, generator=seeded(2)).double(),
        "seed": torch.arange(rows) * 104729,
        "length": torch.arange(rows),
    }
    logits, slots = rows_of("normal", rows, 400), torch.arange(rows)
    out = assert_same_decisions(kernels, logits, slots, state_of(rows, **values), NO_CONTROL)
    assert (out.tokens >= 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 5, 511, 513, 4099])
def test_vocabularies_of_any_size(kernels, vocab):
    values = {name: value[8::7] for name, value in grid_of_parameters(vocab).items()}
    logits = rows_of("normal", len(values["seed"]), vocab)
    mask = torch.rand(logits.shape, generator=seeded(vocab)) < 0.5
    mask[:, vocab // 2] = True
    state, slots = state_of(len(logits), **values), torch.arange(len(logits))
    assert_same_decisions(kernels, logits, slots, state, NO_CONTROL, logprobs=True)
    out = assert_same_decisions(kernels, logits, slots, state, NO_CONTROL, mask=mask, top_logprobs=3)
    assert mask[slots, out.tokens].all()
    assert out.top_ids.shape == (len(logits), min(3, vocab))


CONTROLS = [
    ControlIds(eos=(2,), think=4, end_think=3, tool_call=5, closing=(3,)),
    ControlIds(eos=(2, 7), think=4, end_think=3, tool_call=5, closing=(8, 2, 3)),
    ControlIds(eos=(), think=4, end_think=3, closing=(8, 8, 9, 3)),
    ControlIds(eos=(1, 2, 6)),
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{len(control.eos)} ends, closing {control.closing}")
def test_every_transition_of_the_budget_machine(kernels, control):
    """Random states, each array of them compared after each of three steps; tokens are mostly the special ones."""
    rows, vocab = 64, 10
    generator = seeded(len(control.closing))

    def some(*choices: int) -> torch.Tensor:
        return torch.tensor(choices)[torch.randint(len(choices), (rows,), generator=generator)]

    state = state_of(
        rows,
        phase=some(*Phase) if control.closing else int(Phase.OFF),
        remaining=some(-1, 0, 0, 1, 2),
        cursor=some(*range(max(len(control.closing), 1))),
        tokens_left=some(1, 2, 3, 100),
        ignore_eos=some(0, 1),
        finish=some(*[Finish.NONE] * 6, Finish.STOP, Finish.LENGTH, Finish.ERROR),
        temperature=some(0, 0, 1),
        seed=torch.arange(rows),
    )
    for step in range(3):
        logits = torch.zeros(rows, vocab)
        logits[torch.arange(rows), some(1, 2, 2, 3, 4, 5, 6, 7, 9)] = 9.0
        logits[step::17] = torch.nan
        mask = torch.ones(rows, vocab, dtype=torch.bool)
        mask[step::13] = False
        assert_same_decisions(kernels, logits, torch.arange(rows), state, control, mask=mask if step else None)


def test_what_lies_around_a_row_does_not_matter(kernels, monkeypatch):
    """Strided rows amid NaN, broken neighbours, scratch full of garbage, counters left as they were found."""
    rows, vocab = 10, 1003
    logits = rows_of("normal", rows, vocab)
    values = {"top_p": torch.linspace(0, 1, rows, dtype=torch.float64), "seed": torch.arange(rows)}
    expected = kernels.sample(
        logits, torch.arange(rows), state_of(rows, **values), NO_CONTROL, logprobs=True, top_logprobs=4
    )
    empty = torch.empty

    def garbage(*size: int, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
        return empty(*size, dtype=dtype, **options).fill_(torch.nan if dtype.is_floating_point else -(10**9))

    monkeypatch.setattr(torch, "empty", garbage)
    broken = torch.stack([logits, torch.full_like(logits, torch.nan)], 1).flatten(0, 1)
    twice = {name: value.repeat_interleave(2) for name, value in values.items()}
    state = state_of(2 * rows, **twice)
    out = kernels.sample(scattered(broken), torch.arange(2 * rows), state, NO_CONTROL, logprobs=True, top_logprobs=4)
    for name in ("tokens", "phases", "finish", "logprobs", "top_ids", "top_logprobs"):
        assert_same_bits(getattr(out, name)[::2], getattr(expected, name))
    assert out.finish[1::2].tolist() == [Finish.ERROR] * rows
    if kernels.backend == "triton":
        from headrace.kernels.triton.scratch import counters

        assert (counters(logits.device, 1) == 0).all()


def test_no_synchronising_control_ids(kernels):
    """The ids are copied to the device once, not at every step."""
    if kernels.backend != "triton":
        pytest.skip("about the copy to a device")
    from headrace.kernels.triton.sampling import control_ids

    control, device = CONTROLS[1], torch.zeros(()).device
    assert control_ids(control, device) is control_ids(ControlIds(**asdict(control)), device)
    assert control_ids(control, device).tolist() == [4, 3, 5, 2, 7, 8, 2, 3]
