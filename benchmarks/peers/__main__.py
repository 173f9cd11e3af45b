"""``python -m benchmarks.peers``: install the peers, make the checkpoint, let them take turns, write what was seen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import rows as machine_rows
from benchmarks import timing
from benchmarks.peers import checkpoint, headrace, hugging_face, summary, vllm_cpu
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.peer import ISAS, ROOT, Peer, PeerError
from benchmarks.peers.workload import Job, Row, Workload

WIDTHS = {"bf16": 2, "f32": 4}
"""Bytes of a parameter, where all have the same."""
FORMATS = ("bf16", "f32", "q8_0", "nvfp4", "mxfp4", "q4_k_m")
NAMES = ("headrace", "headrace-bf16", "llama.cpp", "transformers", "vllm")


@dataclass(frozen=True, slots=True)
class Entry:
    """A peer with what it opens, in one format, on so many threads."""

    peer: Peer
    version: str
    model: Path
    format: str
    threads: int

    parameters_per_token: int

    def description(self) -> Row:
        said = {"peer": self.peer.name, "version": self.version, "format": self.format, "threads": self.threads}
        width = WIDTHS.get(self.format)
        return said if width is None else {**said, "weight_bytes_per_token": width * self.parameters_per_token}


class Record:
    """Appends rows to a file, each with the machine, and keeps them."""

    def __init__(self, path: Path, isa: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = []
        self._machine = {"device": machine_rows.device_name("cpu"), "commit": machine_rows.commit(), "isa": isa}

    def add(self, row: Row) -> None:
        row = {**row, **self._machine, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(told(row), flush=True)


def told(row: Row) -> str:
    """A row for the one who waits."""
    who = " ".join(str(row[key]) for key in ("peer", "format", "threads") if key in row)
    if "error" in row:
        return f"{who}: {row['error']}"
    if "tokens_per_s" in row:
        return f"{who}, {row['measure']}: {row['tokens_per_s']:.1f} tokens/s"
    if row["measure"] == "bandwidth":
        return f"memory, {row['threads']} threads: {row['bytes_per_s'] / 1e9:.1f} GB/s"
    return f"{who}, {row['measure']}: " + ", ".join(
        f"{key} {row[key]:.4g}" for key in ("seconds", "read_seconds", "loading_bytes", "serving_bytes") if key in row
    )


def all_peers(cache: Path, isa: str, backend: str) -> dict[str, Peer]:
    found: tuple[Peer, ...] = (
        headrace.peer(isa, backend),
        headrace.rounding_peer(isa),
        LlamaCpp(cache, isa),
        hugging_face.peer(isa),
        vllm_cpu.peer(cache, isa),
    )
    return dict(zip(NAMES, found, strict=True))


def entries(
    peers: list[Peer], formats: list[str], model: str, folder: Path, threads: int, record: Record
) -> Iterator[Entry]:
    """Everything that can be measured; what cannot is recorded with its reason."""
    read = checkpoint.SHAPES[model].parameters_per_token()
    for peer in peers:
        chosen = [format for format in formats if format in peer.formats]
        if not chosen:
            record.add(failed(peer.name, f"keeps weights in {', '.join(peer.formats) or 'none'} only"))
            continue
        try:
            version = peer.install()
            print(f"{peer.name}: {version}", flush=True)
            for format in chosen:
                opened = peer.prepare(folder, format)
                # How headrace scales with its threads is recorded too.
                for count in sorted({1, threads}) if peer.name.startswith(summary.OURS) else [threads]:
                    yield Entry(peer, version, opened, format, count, read)
        except PeerError as error:
            record.add(failed(peer.name, str(error)))


def failed(peer: str, error: str, **more: Any) -> Row:
    return {"measure": "none", "peer": peer, "error": error, **more}


def take_turns(all_entries: list[Entry], rounds: int, workload: Workload, threads: int, record: Record) -> None:
    """Every entry once a round, there and back; the memory's bandwidth before each round and after the last."""
    for number in range(rounds):
        bandwidth(threads, number, record)
        for entry in all_entries[:: -1 if number % 2 else 1]:
            job = Job(str(entry.model), entry.format, entry.threads, number, workload)
            try:
                for row in entry.peer.measure(job):
                    record.add({**entry.description(), "round": number, **row})
            except PeerError as error:
                record.add({**entry.description(), **failed(entry.peer.name, str(error), round=number)})
    bandwidth(threads, rounds, record)


def bandwidth(threads: int, number: int, record: Record) -> None:
    with timing.threads(threads):
        for limit in timing.measure(torch.device("cpu")):
            record.add(
                {
                    "measure": "bandwidth", "round": number, "threads": limit.threads,
                    "bytes_per_s": limit.bytes_per_s, "by": limit.bytes_by,
                }
            )  # fmt: skip


def listed(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """A list from a command line. Raises typer.BadParameter naming what is not allowed."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in found if word not in allowed]
    if wrong or not found:
        raise typer.BadParameter(f"{option} takes some of {', '.join(allowed)}, got {', '.join(wrong) or 'none'}")
    return found


def main(
    peers: Annotated[str, typer.Option(help="Which, with commas between.")] = ",".join(NAMES),
    formats: Annotated[str, typer.Option(help=f"What weights are kept in, of {', '.join(FORMATS)}.")] = "bf16,f32",
    model: Annotated[str, typer.Option(help="The checkpoint: slice or tiny.")] = "slice",
    rounds: Annotated[int, typer.Option(min=0, help="Turns of each peer; 0 installs and prepares only.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every peer.", show_default="all cores")] = None,
    isa: Annotated[str, typer.Option(help="native, or avx2: everyone held to AVX2.")] = "native",
    backend: Annotated[str, typer.Option(help="Headrace's kernels.")] = "auto",
    cache: Annotated[Path, typer.Option(help="Where peers and checkpoints live; about 30 GB with all formats.")] = Path(
        "~/.cache/headrace-peers"
    ),
    out: Annotated[Path | None, typer.Option(help="The rows (.jsonl); .md and .png come beside them.")] = None,
) -> None:
    """Measure headrace beside its peers."""
    chosen = listed(peers, NAMES, "--peers")
    kept = listed(formats, FORMATS, "--formats")
    listed(isa, ISAS, "--isa")
    listed(model, tuple(checkpoint.SHAPES), "--model")
    cores = threads or len(os.sched_getaffinity(0))
    cache = cache.expanduser().resolve()
    path = out or ROOT / "benchmarks" / "results" / f"peers-{time.strftime('%Y-%m-%d-%H%M%S')}.jsonl"
    record = Record(path, isa)
    folder = checkpoint.make(model, cache / "checkpoints" / model)
    known = all_peers(cache, isa, backend)
    ready = list(entries([known[name] for name in chosen], kept, model, folder, cores, record))
    take_turns(ready, rounds, Workload(checkpoint.SHAPES[model].vocab_size), cores, record)
    if rounds == 0:
        return
    path.with_suffix(".md").write_text(summary.markdown(record.rows))
    print(f"\n{summary.markdown(record.rows)}")
    if any("tokens_per_s" in row for row in record.rows):
        summary.plot(record.rows, path.with_suffix(".png"))
    print(f"wrote {path} and its .md and .png")


if __name__ == "__main__":
    typer.run(main)
