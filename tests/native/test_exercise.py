"""Every op on fuzzed shapes and hostile values: sanitizers, threads, instruction paths, another architecture.

``exercise.cpp`` prints a hash of all results per case. Whatever compiled the kernels and whatever ran them, its lines
are those of the installed portable library on one thread.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from headrace.kernels.native.library import EXACT_PATHS, available_paths, find

ROOT = Path(__file__).parents[2]
SEED, CASES = 1, 660
EMULATED_CASES = 220
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CROSS_LIBRARIES = Path("/usr/aarch64-linux-gnu")
"""Where Debian's cross compiler keeps the C and C++ libraries that the emulated program loads."""

# Fresh memory is NaN, as fp32 and in every other format, so that what is read before it is written shows in the hashes.
GARBAGE = {"ASAN_OPTIONS": "malloc_fill_byte=255:max_malloc_fill_size=1000000000"}

Runs = list[subprocess.CompletedProcess[str]]


def tool(name: str) -> str:
    """A program of this environment or of the machine; skips the test where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def sanitizer(names: str) -> str:
    """For HEADRACE_SANITIZE; skips the test where the compiler has no library for it."""
    command = [tool("c++"), f"-fsanitize={names}", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(command, input="int main() {}", text=True, capture_output=True, check=False).returncode:
        pytest.skip(f"the C++ compiler cannot link -fsanitize={names}")
    return names


@contextmanager
def build(*paths: str, **variables: str) -> Iterator[Path]:
    """A folder with the program and instruction paths' libraries, compiled with CMake's ``variables``."""
    generator = ("-G", "Ninja") if shutil.which("ninja") else ("-G", "Unix Makefiles") if tool("make") else ()
    with TemporaryDirectory() as folder:
        settings = [f"-D{name}={value}" for name, value in variables.items()]
        for step in (
            ["-S", str(ROOT), "-B", folder, *generator, *settings],
            ["--build", folder, "--parallel", "2", "--target", "exercise", *paths],
        ):
            done = subprocess.run([tool("cmake"), *step], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        yield Path(folder)


def exercise(
    command: list[str | Path], library: Path, threads: int, cases: int = CASES, fault: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, library, str(threads), str(SEED), str(cases), *fault.split()],
        capture_output=True, text=True, env=os.environ | GARBAGE, check=False,
    )  # fmt: skip


def lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    """The report of a run that found no fault."""
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[:8000]
    assert not run.stderr, run.stderr[:8000]
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def program() -> Iterator[list[str | Path]]:
    tool("c++")
    with build() as folder:
        yield [folder / "exercise"]


@pytest.fixture(scope="module")
def expected(program: list[str | Path]) -> list[str]:
    return lines(exercise(program, find("portable"), 1))


def test_the_report_depends_on_the_inputs(program, expected):
    """Or equal hashes would mean little: nearly every case has one of its own, and another seed other ones."""
    assert len(expected) == CASES
    assert {line.split()[1] for line in expected} == {
        "linear", "experts", "route", "rms_norm", "step_inputs", "embed", "mamba_update", "mamba_prefill",
        "decode_attention", "prefill_attention", "sample",
    }  # fmt: skip
    hashes = {line.split()[-1] for line in expected}
    assert len(hashes) > 0.97 * CASES  # rows may be none
    other = subprocess.run([*program, find("portable"), "1", str(SEED + 1), "110"], capture_output=True, text=True)
    assert len(hashes & {line.split()[-1] for line in lines(other)}) < 5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("path", available_paths())
def test_paths_and_threads(program, expected, path, threads):
    wanted = expected if path in EXACT_PATHS else lines(exercise(program, find(path), 1))
    assert lines(exercise(program, find(path), threads)) == wanted


def find_overruns() -> Runs:
    """The best path in an AddressSanitizer and UBSan build; then with tensors that are too short."""
    path = next(path for path in available_paths() if path in EXACT_PATHS)
    names = sanitizer("address,undefined,float-cast-overflow")
    with build(path, HEADRACE_SANITIZE=names) as folder:
        command, library = [folder / "exercise"], folder / f"headrace_{path}.so"
        return [exercise(command, library, 3), exercise(command, library, 1, fault="overrun")]


@pytest.mark.timeout(1200)
@pytest.mark.early(job=find_overruns)
def test_memory(expected, early, request):
    clean, planted = early[request.node.nodeid].result()
    assert lines(clean) == expected
    assert planted.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in planted.stderr
    assert "kernels/native" in planted.stderr


def find_races() -> Runs:
    """The portable path, whose every access is seen, in a ThreadSanitizer build; then with every op running twice."""
    with build("portable", HEADRACE_SANITIZE=sanitizer("thread")) as folder:
        command, library = [folder / "exercise"], folder / "headrace_portable.so"
        return [exercise(command, library, 3), exercise(command, library, 3, 11, fault="race")]


@pytest.mark.timeout(1200)
@pytest.mark.early(job=find_races)
def test_races(expected, early, request):
    clean, planted = early[request.node.nodeid].result()
    if "unexpected memory mapping" in clean.stderr:
        pytest.skip("ThreadSanitizer's memory does not fit into this kernel's layout of processes")
    assert lines(clean) == expected
    assert planted.returncode != 0
    assert "ThreadSanitizer: data race" in planted.stderr
    assert "kernels/native" in planted.stderr


def emulate() -> Runs:
    """The portable path of another architecture, under an emulator."""
    variables = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
    tool(CROSS_COMPILER)
    if not CROSS_LIBRARIES.exists():
        pytest.skip(f"{CROSS_LIBRARIES} is missing")
    command = [tool(EMULATOR), "-L", str(CROSS_LIBRARIES)]
    with build("portable", **variables, CMAKE_CXX_COMPILER=CROSS_COMPILER, CMAKE_CXX_FLAGS_RELEASE="-O2") as folder:
        program, library = folder / "exercise", folder / "headrace_portable.so"
        return [exercise([*command, program], library, threads, EMULATED_CASES) for threads in (1, 3)]


@pytest.mark.timeout(1200)
@pytest.mark.early(job=emulate)
def test_aarch64(expected, early, request):
    for run in early[request.node.nodeid].result():
        assert lines(run) == expected[:EMULATED_CASES]
