"""Headrace through its public API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.peer import AVX2, PythonPeer, run
from benchmarks.peers.workload import Generate, Job

FORMATS = ("bf16", "nvfp4")
"""nvfp4: what ``headrace quantize`` makes, experts in NVFP4, most other large matrices in FP8, the rest as it was."""


class Headrace(PythonPeer):
    """This checkout, in the environment that runs the comparison."""

    def prepare(self, checkpoint: Path, format: str) -> Path:
        if format == "bf16":
            return checkpoint
        out = checkpoint.with_name(f"{checkpoint.name}-{format}")
        if not out.exists():
            part = out.with_name(f"part-{out.name}")
            script = "import sys; from headrace.engine.cli import main; sys.exit(main())"
            run([self.python, "-c", script, "quantize", checkpoint, part, "--format", format])
            part.rename(out)
        return out


def peer(isa: str, backend: str) -> PythonPeer:
    """Headrace as it comes, with activations in fp32."""
    options = {"backend": backend}
    if isa == "avx2" and backend in ("auto", "native"):
        options["instructions"] = "avx2"
    return Headrace("headrace", FORMATS, ("torch",), environment=AVX2 if isa == "avx2" else {}, options=options)


def rounding_peer(isa: str) -> PythonPeer:
    """The same with activations rounded to bfloat16 before each product, as llama.cpp and vLLM have them."""
    instructions = "avx512_bf16" if isa == "native" else isa
    options = {"backend": "native", "instructions": instructions}
    return Headrace("headrace-bf16", ("bf16",) if isa == "native" else (), ("torch",), options=options)


def imports() -> None:
    import headrace.engine  # noqa: F401


@contextmanager
def opened(job: Job) -> Iterator[Generate]:
    """An engine with the shipped settings; ``job.options`` go to EngineConfig."""
    import torch

    from headrace.engine import Engine, EngineConfig, SamplingParams

    config = EngineConfig(max_sequences=max(job.workload.batches), max_context=job.workload.max_context, **job.options)
    if config.kernels == "native":
        config = replace(config, threads=job.threads)
    else:
        torch.set_num_threads(job.threads)

    with Engine(job.model, config) as engine:

        def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> Sequence[Sequence[int]]:
            params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
            streams = [engine.generate_stream(prompt, params) for prompt in prompts]
            return [[token for event in stream for token in event.token_ids] for stream in streams]

        yield generate
