"""Ops taken down and run in one call: the same bits, nothing read too early, nothing run after a failure."""

from collections.abc import Iterator

import pytest
import torch
from kernel_checks import assert_same_bits, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.engine import EngineConfig, SamplingParams
from headrace.engine.engine import Engine
from headrace.kernels.native.library import RUN_ALL, Pool
from headrace.kernels.native.linear import linear, pack_linear
from headrace.kernels.native.norm import rms_norm
from headrace.kernels.norm import Norm

READS_NOTHING = {"empty", "view", "slice", "split", "split_with_sizes", "flatten", "unbind", "as_strided", "detach"}


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def test_the_same_bits(pool: Pool) -> None:
    generator = seeded()
    first, second = (pack_linear([torch.randn(64, 64, generator=generator)], pool=pool) for _ in range(2))
    norm, x = Norm(torch.randn(64, generator=generator), 1e-5), torch.randn(9, 64, generator=generator)

    def chain() -> torch.Tensor:
        return rms_norm(linear(linear(x, first, norm=norm, pool=pool), second, relu2=True, pool=pool), norm, pool=pool)

    expected = chain()
    for _ in range(3):
        with pool.together():
            y = chain()
            garbage = [torch.full((9, 64), torch.nan) for _ in range(8)]  # takes what was freed too early
        assert_same_bits(y, expected)
        del garbage


def test_after_an_exception_nothing_has_run(pool: Pool) -> None:
    packed, x = pack_linear([torch.eye(32)], pool=pool), torch.ones(2, 32)
    with pytest.raises(KeyError), pool.together():
        y = linear(x, packed, pool=pool)
        y.fill_(7)
        raise KeyError
    assert (y == 7).all()
    assert_same_bits(linear(x, packed, pool=pool), x)  # and the pool goes on


def test_a_copy_of_what_is_not_written_yet_is_refused(pool: Pool) -> None:
    packed = pack_linear([torch.eye(32)], pool=pool)
    with pytest.raises(RuntimeError, match="may not be written yet"), pool.together():
        pool.contiguous(linear(torch.ones(4, 32), packed, pool=pool).t())


def test_no_queue_inside_a_queue(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="already"), pool.together(), pool.together():
        pass


def test_the_failing_op_is_named(pool: Pool) -> None:
    packed, x = pack_linear([torch.eye(32)], pool=pool), torch.ones(2, 32)
    wide = pack_linear([torch.ones(1, 1 << 18)], pool=pool)
    with pytest.raises(MemoryError, match="scratch of linear"), pool.together():
        rms_norm(x, Norm(torch.ones(32), 1e-5), pool=pool)
        linear(torch.ones(1 << 18).expand(1 << 26, -1), wide, pool=pool)  # 64 TiB of packed rows
    assert_same_bits(linear(x, packed, pool=pool), x)


def test_little_is_kept(pool: Pool) -> None:
    packed, x = pack_linear([torch.eye(64)], pool=pool), torch.rand(1024, 64)
    runs = []
    function = pool.function(RUN_ALL)
    pool.ops[RUN_ALL.name] = lambda *arguments: runs.append(0) or function(*arguments)
    with pool.together():
        y = x
        for _ in range(40):  # 256 KiB each
            y = linear(y, packed, pool=pool)
    assert_same_bits(y, x)
    assert 5 <= len(runs) <= 10


def test_torch_reads_nothing_while_a_step_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the embedded model, whose decode steps are queued: an op of torch's on their results would see garbage."""
    seen: set[str] = set()
    together = Pool.together

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    class Both:
        def __init__(self, pool: Pool) -> None:
            self.contexts = together(pool), Watch()

        def __enter__(self) -> None:
            for context in self.contexts:
                context.__enter__()

        def __exit__(self, *error: object) -> None:
            for context in reversed(self.contexts):
                context.__exit__(*error)

    monkeypatch.setattr(Pool, "together", lambda pool: Both(pool))
    with Engine(config=EngineConfig(backend="native")) as engine:
        params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
        streams = [engine.generate_stream("one two", params) for _ in range(3)]
        assert all([token for event in stream for token in event.token_ids] for stream in streams)
    assert seen
    assert seen <= READS_NOTHING, seen - READS_NOTHING
