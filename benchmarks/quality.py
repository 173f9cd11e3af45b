"""What quantisation costs: the embedded model, or one like it, as it is and as ``headrace quantize`` makes it.

    python -m benchmarks.quality                       a table: logits beside the float weights', accuracy on its tasks
    python -m benchmarks.quality --problems 50 --json quality.json

Logits are compared token by token along the float model's own greedy answers, so that no difference is counted twice.
Accuracy is that of ``benchmarks.tiny.evaluate``, effort high, on the same held-out problems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.tiny import problems
from benchmarks.tiny.evaluate import AT_ONCE, CATEGORIES, MODEL, ask_all, score
from headrace.engine import Engine, EngineConfig
from headrace.engine.cli.quantize import quantize_checkpoint
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.load import load_model
from headrace.engine.model.nemotron_h import NemotronH
from headrace.engine.options import KvDtype

FP8_KV: KvDtype = "fp8"
VARIANTS: dict[str, tuple[str, KvDtype]] = {
    "float": ("float", "auto"),
    "fp8": ("fp8", "auto"),
    "nvfp4": ("nvfp4", "auto"),
    "float, fp8 KV": ("float", FP8_KV),
    "nvfp4, fp8 KV": ("nvfp4", FP8_KV),
}
"""Name -> (``quantize --format``, or "float" for the model as it is; dtype of keys and values)."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A question and the float model's greedy answer to it."""

    ids: tuple[int, ...]
    prompt: int  # tokens of it that are the question


@dataclass(frozen=True, slots=True)
class Quality:
    """A variant beside the float model."""

    variant: str
    weights_bytes: int
    logit_error: (
        float  # norm of the difference over norm of the float model's logits, means over the vocabulary removed
    )
    divergence: float  # mean Kullback-Leibler divergence of the next token's distribution, nats
    agreement: float  # share of positions with the same most likely token
    accuracy: dict[str, float]  # by category


def logits_along(model: NemotronH, transcript: Transcript, kv_dtype: torch.dtype | None) -> Tensor:
    """Logits [tokens of the answer, vocab] fp64, each the answer's next token's, mean 0."""
    ids = torch.tensor(transcript.ids)
    none = torch.empty(0, dtype=torch.int64)
    caches = Caches.allocate(model.config, 1, 1, len(ids), kv_dtype=kv_dtype)
    table = torch.zeros(1, 1, dtype=torch.int32)
    hidden = model.forward(Batch(ids, none, none, (0,), (0,), (len(ids),), table, none), caches)
    logits = model.logits(hidden[transcript.prompt - 1 : -1]).double()
    return logits - logits.mean(-1, keepdim=True)


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float, float]:
    """(relative error, divergence, agreement) over all positions of all transcripts."""
    old, new = torch.cat(list(expected)), torch.cat(list(actual))
    divergence = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()
    agreement = (old.argmax(-1) == new.argmax(-1)).double().mean()
    return float((new - old).norm() / old.norm()), float(divergence), float(agreement)


def answer(engine: Engine, count: int, seed: int) -> tuple[dict[str, float], list[Transcript]]:
    """(accuracy by category, the answers as they were decided)."""
    accuracy, transcripts = {}, []
    for category in CATEGORIES:
        questions = problems.held_out(category, count, seed)
        outcomes = ask_all(engine, questions, label=category)
        accuracy[category] = score(outcomes).accuracy
        for problem, outcome in zip(questions, outcomes, strict=True):
            prompt = engine.prompt_ids(problem.messages).ids
            transcripts.append(Transcript((*prompt, *outcome.ids), len(prompt)))
    return accuracy, transcripts


@contextmanager
def stored_as(model: Path, form: str) -> Iterator[Path]:
    """The model's folder, or one for a while with its weights quantised."""
    if form == "float":
        yield model
        return
    with TemporaryDirectory() as folder:
        quantize_checkpoint(model, Path(folder), form)  # type: ignore[arg-type]
        yield Path(folder)


def measure(model: Path, count: int, seed: int) -> list[Quality]:
    """All variants; the first one is what the others are compared with."""
    found: list[Quality] = []
    transcripts: list[Transcript] = []
    expected: list[Tensor] = []
    for variant, (form, kv_dtype) in VARIANTS.items():
        pages = torch.float8_e4m3fn if kv_dtype == FP8_KV else None
        with stored_as(model, form) as folder:
            with Engine(folder, EngineConfig(max_sequences=AT_ONCE, kv_dtype=kv_dtype)) as engine:
                accuracy, answers = answer(engine, count, seed)
            transcripts = transcripts or answers
            network = load_model(folder)
            actual = [logits_along(network, one, pages) for one in transcripts[:: max(1, len(transcripts) // 60)]]
            expected = expected or actual
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found.append(Quality(variant, size, *compare(expected, actual), accuracy))
    return found


def table(found: Sequence[Quality]) -> Table:
    """For people."""
    shown = Table("weights", "MiB", "logit error", "KL, nats", "same token", *CATEGORIES, box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for one in found:
        shown.add_row(
            one.variant, f"{one.weights_bytes / 2**20:.2f}", f"{one.logit_error:.4f}", f"{one.divergence:.6f}",
            f"{one.agreement:.2%}", *(f"{one.accuracy[category]:.1%}" for category in CATEGORIES),
        )  # fmt: skip
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--problems", type=int, default=100, help="held-out problems per category")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = measure(args.model, args.problems, args.seed)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table(found))
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
