"""Loading, choosing a path, and pools of threads."""

import gc
import struct
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from headrace.engine import Engine, EngineConfig, SamplingParams
from headrace.kernels import select
from headrace.kernels.native import library
from headrace.kernels.native.library import NotBuilt, Op, Pool, available_paths, choose_path
from headrace.kernels.native.linear import LINEAR, linear, pack_linear


def test_the_portable_path_runs_everywhere() -> None:
    assert available_paths()[-1] == "portable"
    assert set(available_paths()) <= set(library.PATHS)


def test_a_path_can_be_asked_for() -> None:
    assert Pool(1, "portable").path == "portable"
    assert Pool(1).path == choose_path() == next(p for p in library.EXACT_PATHS if p in available_paths())
    with pytest.raises(ValueError, match="'sse9' are not this machine's, which runs .*portable"):
        Pool(1, "sse9")


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", lambda path: None)
    library._library.cache_clear()
    try:
        with pytest.raises(NotBuilt, match=r"headrace_portable\.so is missing.* C\+\+20 compiler"):
            Pool(1)
        with pytest.raises(ValueError, match=r"backend 'native': .*headrace_portable\.so is missing"):
            select("native")
    finally:
        library._library.cache_clear()


def test_a_library_of_another_layout_is_refused() -> None:
    with pytest.raises(NotBuilt, match="another version: linear takes"):
        Op("linear", "qq")(Pool(1), 0, 0)


@pytest.mark.parametrize("op", [LINEAR])
def test_layouts_are_of_eight_bytes_a_field(op: Op) -> None:
    assert op.layout.size == 8 * len(op.layout.unpack(bytes(op.layout.size)))
    assert isinstance(op.layout, struct.Struct)


def threads_now() -> int:
    return int(psutil.Process().num_threads())


def test_no_thread_is_left_behind() -> None:
    before = threads_now()
    forgotten, closed = Pool(4), Pool(3)
    assert threads_now() == before + 3 + 2
    closed.close()
    closed.close()
    assert threads_now() == before + 3
    with pytest.raises(RuntimeError, match="linear on a pool that was closed"):
        linear(torch.ones(1, 2), pack_linear([torch.ones(2, 2)], pool=forgotten), pool=closed)
    del forgotten
    gc.collect()
    assert threads_now() == before


def test_an_engine_that_is_closed_leaves_no_thread() -> None:
    before = threads_now()
    with Engine(config=EngineConfig(threads=4)) as engine:
        assert engine.generate([10, 577], SamplingParams(max_tokens=2)).usage.completion_tokens <= 2
        assert threads_now() >= before + 3
    assert threads_now() == before


@pytest.mark.parametrize("threads", [0, -1, library.MAX_THREADS + 1, 1 << 32])
def test_a_number_of_threads_that_cannot_be(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be 1..{library.MAX_THREADS}, got {threads}"):
        Pool(threads)


def test_threads_that_the_system_refuses_are_one_error() -> None:
    script = """
import resource
from headrace.kernels.native.library import Pool
small = 1 << 33
resource.setrlimit(resource.RLIMIT_AS, (small, small))
try:
    Pool(1024)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "threads: the system does not start 1024\n", done.stderr[-500:]


def test_other_threads_run_meanwhile() -> None:
    """The GIL is released during an op: this thread counts on between another's last line before it and next after."""
    pool = Pool(1)
    packed, x = pack_linear([torch.zeros(4096, 4096)], pool=pool), torch.zeros(512, 4096)
    counted, meanwhile, done = [0], [0], threading.Event()

    def work() -> None:
        before = counted[0]
        linear(x, packed, pool=pool)
        meanwhile[0] = counted[0] - before
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        counted[0] += 1
    thread.join()
    assert meanwhile[0] > 1000


def test_torchs_defaults_and_modes_do_not_matter() -> None:
    pool = Pool(2)
    # Subnormal products: flushed to zero where a thread's mode says so.
    weight, x = torch.full((64, 64), 1e-20), torch.full((40, 64), 1e-20)
    packed = pack_linear([weight], pool=pool)
    expected = linear(x, packed, pool=pool)
    assert expected[0, 0] > 0
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_flush_denormal(True)
    try:
        results = [linear(x, packed, pool=pool) for _ in range(20)]
    finally:
        torch.set_flush_denormal(False)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 64).double(), torch.ones(2, 64).bfloat16(), torch.ones(64, 2).t(), torch.ones(2, 64, device="meta")],
)
def test_what_a_kernel_would_misread_is_refused(x: torch.Tensor) -> None:
    pool = Pool(1)
    packed = pack_linear([torch.ones(32, 64)], pool=pool)
    with pytest.raises(ValueError, match="expected float32 on the CPU"):
        linear(x, packed, pool=pool)
    with pytest.raises(ValueError, match="a weight of 64 inputs for rows of 63"):
        linear(torch.ones(2, 63), packed, pool=pool)


def test_one_pool_serves_threads_one_after_the_other() -> None:
    pool = Pool(2)
    weights = [torch.randn(64, 64) for _ in range(4)]
    packed = [pack_linear([w], pool=pool) for w in weights]
    x = torch.randn(3, 64)
    expected = [linear(x, p, pool=pool) for p in packed]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(linear(x, packed[i], pool=pool), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
