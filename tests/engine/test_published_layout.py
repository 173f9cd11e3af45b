"""The published checkpoint, whole: every tensor has its place, and reading a part takes the memory of a part."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from published import NANO, SUPER
from published_checkpoint import BYTES, FP8_MATRICES, NVFP4_MATRICES, SHARDS, TENSORS, tensors, write
from typer.testing import CliRunner

from headrace.engine.cli import app
from headrace.engine.cli.census import take_census
from headrace.engine.config import ModelConfig
from headrace.engine.model import CheckpointError
from headrace.engine.model.weights import open_weights
from headrace.engine.model.weights.files import list_tensors
from headrace.engine.model.weights.names import places
from headrace.kernels.formats import Fp8, Nvfp4

RANKS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("super")
    write(folder, SUPER)
    assert sum(file.stat().st_blocks for file in folder.glob("*.safetensors")) * 512 < 100e6, "files without holes"
    return folder


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> ModelConfig:
    return ModelConfig.load(checkpoint)


def test_every_tensor_is_placed_exactly_once(checkpoint: Path, config: ModelConfig) -> None:
    expected = places(config)
    stored = {name.removeprefix("backbone."): (dtype, shape) for name, dtype, shape in tensors()}
    assert len(stored) == TENSORS
    assert expected.keys() == stored.keys()
    for name, (dtype, shape) in stored.items():
        assert dtype in expected[name].dtypes, name
        assert shape == expected[name].shape, name
    with open_weights(checkpoint, config) as weights:  # which refuses what is missing or left over
        experts = weights["layers.1.mixer.experts.up_proj"]
        assert len(experts) == 512
        first = experts[0]
        assert isinstance(first, Nvfp4)
        assert first.shape == (2688, 1024)
        assert isinstance(weights["layers.0.mixer.in_proj.weight"], Fp8)
        assert weights["layers.7.mixer.q_proj.weight"].dtype == torch.bfloat16


def test_totals_are_the_published_ones(checkpoint: Path, config: ModelConfig) -> None:
    files = list_tensors(checkpoint)
    assert len(files) == SHARDS
    assert sum(entry.num_bytes for entries in files.values() for entry in entries) == BYTES
    census = take_census(checkpoint, config)
    assert census.num_bytes == BYTES
    assert config.quantization is not None
    formats = list(config.quantization.modules.values())
    assert (formats.count("nvfp4"), formats.count("fp8")) == (NVFP4_MATRICES, FP8_MATRICES)
    # The same from the .json files alone, before anything is downloaded.
    assert census.parameters == 123_611_033_088


def test_the_json_files_are_enough(checkpoint: Path, config: ModelConfig, tmp_path: Path) -> None:
    for file in checkpoint.glob("*.json"):  # the index too, whose files are not there
        shutil.copy(file, tmp_path)
    census = take_census(tmp_path, ModelConfig.load(tmp_path))
    assert census.bytes_are_assumed
    assert census.num_bytes == BYTES


def test_inspect_takes_seconds(checkpoint: Path) -> None:
    start = time.process_time()
    result = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 0, result.output
    assert "123,611,033,088" in result.output
    assert time.process_time() - start < 25  # a bound against quadratic work; benchmarks say how fast it is


def test_the_shard_of_a_rank_is_read_in_bounded_memory(checkpoint: Path, config: ModelConfig) -> None:
    """One of eight expert-parallel ranks: its experts and nobody else's, one at a time."""
    rank, process = 3, psutil.Process()
    with open_weights(checkpoint, config) as weights:
        before, most, read = process.memory_info().rss, 0, 0
        for layer in (1, 3, 5):
            for matrix in ("up_proj", "down_proj"):
                experts = weights[f"layers.{layer}.mixer.experts.{matrix}"]
                share = len(experts) // RANKS
                for expert in range(rank * share, (rank + 1) * share):
                    weight = experts[expert]
                    assert not weight.codes.any()  # touches every byte; holes read as zeros
                    read += weight.nbytes
                    most = max(most, process.memory_info().rss - before)
    assert read == 3 * 2 * 64 * (2688 * 1024 * 9 // 16 + 4)
    assert most < 64 << 20


def test_another_layout_is_refused(checkpoint: Path, config: ModelConfig) -> None:
    other = replace(config, vocab_size=config.vocab_size + 1)
    shape = r"embeddings.weight' has shape \[131072, 4096\]"
    with pytest.raises(CheckpointError, match=shape), open_weights(checkpoint, other):
        pass
    assert config.moe is not None
    fewer = replace(config, quantization=None, moe=replace(config.moe, num_experts=511))
    dtype = "layers.0.mixer.in_proj.weight' has dtype F8_E4M3"
    with pytest.raises(CheckpointError, match=dtype), open_weights(checkpoint, fewer):
        pass


@pytest.mark.parametrize(("fields", "billions"), [(SUPER, 123.611), (NANO, 31.578)])
def test_parameters_of_both_models(fields: dict[str, Any], billions: float, tmp_path: Path) -> None:
    assert round(take_census(tmp_path, ModelConfig.from_json(fields)).parameters / 1e9, 3) == billions
