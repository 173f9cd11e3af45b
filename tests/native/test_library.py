"""Loading, choosing a path, and pools of threads."""

import gc
import struct
import threading

import pytest
import torch

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


def test_no_thread_is_left_behind() -> None:
    def count() -> int:
        import psutil

        return int(psutil.Process().num_threads())

    before = count()
    pool = Pool(4)
    assert count() == before + 3
    del pool
    gc.collect()
    assert count() == before


def test_other_threads_run_meanwhile() -> None:
    """The GIL is released during an op: this thread counts on while another is inside one."""
    pool = Pool(1)
    packed = pack_linear([torch.zeros(4096, 4096)], pool=pool)
    x = torch.zeros(256, 4096)
    began, ended = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        linear(x, packed, pool=pool)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    counted = 0
    while not ended.is_set():
        counted += 1
    thread.join()
    assert counted > 1000


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
