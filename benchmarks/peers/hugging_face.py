"""transformers' own generate(), with its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.peer import AVX2, PythonPeer
from benchmarks.peers.workload import Generate, Job


def peer(isa: str) -> PythonPeer:
    """The transformers that the tests compare with, in the environment that runs the comparison."""
    return PythonPeer(
        "transformers", ("f32", "bf16"), ("transformers", "torch"), environment=AVX2 if isa == "avx2" else {}
    )


def imports() -> None:
    from transformers import NemotronHForCausalLM  # noqa: F401


@contextmanager
def opened(job: Job) -> Iterator[Generate]:
    """The model in ``job.format``, its implementation of the experts transformers' default."""
    import torch
    from transformers import GenerationConfig, NemotronHForCausalLM

    torch.set_num_threads(job.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[job.format]
    model: Any = NemotronHForCausalLM.from_pretrained(job.model, dtype=dtype)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[no-untyped-call]

    def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> Sequence[Sequence[int]]:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    yield generate
