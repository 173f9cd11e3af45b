"""What a checkpoint's model is called."""

import json

import pytest

from headrace.engine import Engine, EngineConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.naming import model_name

SUPER = "nvidia/nemotron-3-super-120b-a12b"


@pytest.mark.parametrize(
    ("folder", "config", "name"),
    [
        ("my-model", {}, "my-model"),
        ("my-model", {"_name_or_path": "someone/their-model_2.5"}, "someone/their-model_2.5"),
        ("my-model", {"_name_or_path": "/home/someone/checkpoints/17"}, "my-model"),
        ("my-model", {"_name_or_path": "./checkpoint"}, "my-model"),
        ("my-model", {"_name_or_path": None}, "my-model"),
        ("models--someone--their--model/snapshots/0a1b2c", {}, "someone/their--model"),
        ("models--someone--model/snapshots/0a1b2c", {"_name_or_path": "base/model"}, "someone/model"),
        ("snapshots/0a1b2c", {}, "0a1b2c"),
        ("models--nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8/snapshots/0a1b2c", {}, SUPER),
        ("models--nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4/snapshots/0a1b2c", {}, SUPER),
        ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {}, SUPER),
        ("nemotron-3-super-120b-a12b", {}, SUPER),
        ("x", {"_name_or_path": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"}, "nvidia/nemotron-3-nano-30b-a3b"),
        ("models--someone--Nemotron-3-Super-tuned/snapshots/0a1b2c", {}, "someone/Nemotron-3-Super-tuned"),
    ],
)
def test_names(tmp_path, folder, config, name):
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    assert model_name(path) == name
    link = tmp_path / "link"
    link.symlink_to(path)
    assert model_name(link) == name


def test_an_engine_has_its_checkpoints_name(tmp_path):
    """From a folder as the hub's cache makes it: links, under a commit's hash."""
    snapshot = tmp_path / "models--someone--their-model" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for file in EMBEDDED_MODEL.iterdir():
        (snapshot / file.name).symlink_to(file)
    with Engine(snapshot, EngineConfig(max_sequences=1, max_context=64)) as engine:
        assert engine.model_name == "someone/their-model"
    with Engine(config=EngineConfig(max_sequences=1, max_context=64)) as engine:
        assert engine.model_name == "headrace-tiny"
