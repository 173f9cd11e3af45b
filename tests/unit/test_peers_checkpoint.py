"""The checkpoint that peers are compared on: what its sizes say, and that engines agree on its tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from benchmarks.peers import checkpoint, headrace, hugging_face
from benchmarks.peers.workload import Job, Workload
from headrace.engine.config import ModelConfig

TINY = checkpoint.SHAPES["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make("tiny", tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_sizes(tiny: Path) -> None:
    index = json.loads((tiny / checkpoint.INDEX).read_text())
    with safe_open(tiny / "model-00001.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes.keys() == index["weight_map"].keys()
    sizes = {name: size[0] * (size[1] if len(size) > 1 else 1) * (size[2] if len(size) > 2 else 1)
             for name, size in shapes.items()}  # fmt: skip
    assert sum(sizes.values()) == TINY.parameters()
    # A token goes to 4 of 16 experts, and looks one row of the embedding table up.
    idle = {f".experts.{expert}." for expert in range(4, 16)}
    read = sum(
        size for name, size in sizes.items()
        if not name.startswith("backbone.embeddings") and not any(part in name for part in idle)
    )  # fmt: skip
    assert read == TINY.parameters_per_token()


def test_the_slice_has_supers_widths() -> None:
    config = ModelConfig.from_json(checkpoint.config(checkpoint.SHAPES["slice"]))
    assert config.pattern == "MEM*E"
    assert config.hidden_size == 4096
    assert config.mamba is not None and config.mamba.projection_size == 18560
    assert config.moe is not None and (config.moe.top_k, config.moe.latent_size) == (22, 1024)
    assert round(checkpoint.SHAPES["slice"].parameters() / 1e6, 1) == 2038.6
    assert round(checkpoint.SHAPES["slice"].parameters_per_token() / 1e6, 1) == 737.3


def test_it_is_made_once_and_always_the_same(tiny: Path, tmp_path: Path) -> None:
    again = checkpoint.make("tiny", tmp_path)
    for file in sorted(tiny.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    weights = again / "model-00001.safetensors"
    weights.write_bytes(b"")
    checkpoint.make("tiny", tmp_path)
    assert weights.read_bytes() == b""  # it was there
    (again / checkpoint.INDEX).unlink()
    checkpoint.make("tiny", tmp_path)
    assert weights.stat().st_size > 1 << 20  # it was not whole


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(OSError, match="slice needs 4.1 GB, 1.0 GB are free"):
        checkpoint.make("slice", tmp_path)
    assert not list(tmp_path.iterdir())


def test_we_and_transformers_give_the_same_tokens(tiny: Path) -> None:
    """Also the proof that both ways to open it, as the comparison does, generate what they are asked for."""
    job = Job(str(tiny), "f32", 1, 0, Workload(TINY.vocab_size, batches=(4,)), {"backend": "reference"})
    draw = random.Random(0)
    prompts = [draw.choices(range(3, TINY.vocab_size), k=20) for _ in range(4)]
    with headrace.opened(job) as generate:
        ours = generate(prompts, 24)
    with hugging_face.opened(job) as generate:
        theirs = generate(prompts, 24)
    assert ours == theirs
    assert [len(answer) for answer in ours] == [24] * 4
    assert len({token for answer in ours for token in answer}) > 24


def test_a_turn_in_a_process_of_its_own(tiny: Path) -> None:
    workload = Workload(TINY.vocab_size, batches=(1, 2), prompt_tokens=4, new_tokens=64, prefill_tokens=8)
    load, *rows, memory = headrace.peer("native", "reference").measure(Job(str(tiny), "bf16", 1, 0, workload))
    weights = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert load["measure"] == "load"
    assert load["bytes"] == memory["bytes"] == weights
    assert load["read_seconds"] > 0
    assert [row["measure"] for row in rows] == ["decode B=1", "decode B=2", "prefill 8"]
    assert memory["loading_bytes"] > weights
    assert memory["serving_bytes"] > weights
