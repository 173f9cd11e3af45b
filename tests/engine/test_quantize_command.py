"""``headrace quantize``: what it chooses, what it writes, what it reports, what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from headrace.engine import Engine, EngineConfig, SamplingParams
from headrace.engine.cli import main
from headrace.engine.cli.quantize import choose, quantize_checkpoint
from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model import load_model
from headrace.engine.model.weights import open_weights
from headrace.engine.model.weights.files import list_tensors
from headrace.engine.model.weights.names import modules
from headrace.kernels.formats import Fp8, Nvfp4, dequantised, tensors_of
from headrace.kernels.quantize import quantize_fp8, quantize_nvfp4

SIZES = {"moe_latent_size": 32, "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("original"), "ME*-E", mtp="*E", dtype=torch.bfloat16, shards=2, **SIZES
    ).folder
    (folder / "chat_template.jinja").write_text("template")
    (folder / "pytorch_model.safetensors.md5").write_text("of other files")
    return folder


def refuses(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["quantize", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_the_release_s_recipe(original):
    config = ModelConfig.load(original)
    chosen, unfit = choose(config, "nvfp4")
    assert not unfit
    assert {name for name, form in chosen.items() if form == "nvfp4"} == {
        f"layers.{layer}.mixer.experts.{expert}.{half}_proj"
        for layer in (1, 4) for expert in range(4) for half in ("up", "down")
    }  # fmt: skip
    assert {name for name, form in chosen.items() if form == "fp8"} == {
        "layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "layers.3.mixer.up_proj", "layers.3.mixer.down_proj",
        *(f"layers.{layer}.mixer.shared_experts.{half}_proj" for layer in (1, 4) for half in ("up", "down")),
    }  # fmt: skip
    assert choose(config, "fp8")[0] == dict.fromkeys(chosen, "fp8")
    kept, _ = choose(
        config, "nvfp4", ["layers.0", "backbone.layers.1", "*shared_experts.up_proj", "layers.3.*.down_proj"]
    )
    assert kept.keys() == {
        name for name in chosen
        if name.startswith(("layers.3.mixer.up", "layers.4")) and "shared_experts.up" not in name
    }  # fmt: skip


@pytest.mark.parametrize("target", ["nvfp4", "fp8"])
def test_what_is_written(original, tmp_path, target):
    """Every tensor in a place of its own, encoded or untouched; both metadata files; everything else copied."""
    out = tmp_path / "deep" / "out"
    report = quantize_checkpoint(original, out, target, max_shard_bytes=30_000)
    config, before = ModelConfig.load(out), ModelConfig.load(original)
    chosen, _ = choose(before, target)
    assert dict(config.quantization.modules) == chosen
    assert config.quantization.kv_cache is None
    for file in ("config.json", "hf_quant_config.json"):
        assert '"quant_algo": "MIXED_PRECISION"' in (out / file).read_text()
    assert (out / "chat_template.jinja").read_text() == "template"
    files = list_tensors(out)
    assert len(files) > 3 and {file.name[-18:-12] for file in files} == {f"-{len(files):05d}"}
    for file in files:
        sizes = [entry.num_bytes for entry in list_tensors(out)[file]]
        assert sum(sizes) <= 30_000 or len(sizes) == 1
    assert {file.name for file in out.iterdir()} == {
        *(file.name for file in files), "config.json", "hf_quant_config.json", "model.safetensors.index.json",
        "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    seen = 0
    with open_weights(original, before) as floats, open_weights(out, config) as weights:
        for name in floats:
            old, new = floats[name], weights[name]
            for row in range(len(old)) if name.endswith(("experts.up_proj", "experts.down_proj")) else [None]:
                pair = (old, new) if row is None else (old[row].clone(), new[row])
                module = name.removesuffix(".weight") if row is None else name.replace("experts.", f"experts.{row}.", 1)
                form = chosen.get(module) if name.endswith(("weight", "_proj")) else None
                expected = {"fp8": quantize_fp8, "nvfp4": quantize_nvfp4, None: lambda t: t}[form](pair[0])
                for actual, wanted in zip(tensors_of(pair[1]), tensors_of(expected), strict=True):
                    assert actual.dtype == wanted.dtype and torch.equal(bits(actual), bits(wanted)), name
                seen += form is not None
    assert seen == len(chosen)
    assert report.bytes_after == sum(entry.num_bytes for entries in files.values() for entry in entries)
    load_model(out)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def test_the_embedded_model(tmp_path, capsys):
    """By the command line: smaller, reported layer by layer, and it still answers."""
    assert main(["quantize", str(EMBEDDED_MODEL), str(tmp_path), "--keep", "layers.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("layers.")}
    assert rows.keys() == {"layers.1", "layers.2", "layers.4", "layers.5", "layers.7"}
    config = ModelConfig.load(EMBEDDED_MODEL)
    with open_weights(EMBEDDED_MODEL, config) as old, open_weights(tmp_path, ModelConfig.load(tmp_path)) as new:
        squares, errors = 0.0, 0.0
        for half in ("up", "down"):
            for index in range(16):
                before = old[f"layers.1.mixer.experts.{half}_proj"][index].double()
                after = dequantised(new[f"layers.1.mixer.experts.{half}_proj"][index]).double()
                squares, errors = squares + before.square().sum(), errors + (before - after).square().sum()
    assert rows["layers.1"][:2] == ["32", f"{(errors / squares) ** 0.5:.4f}"]
    assert 0.05 < float(rows["layers.1"][1]) < 0.1 and 0.02 < float(rows["layers.1"][3]) < 0.03
    assert re.fullmatch(r"4\.72 MiB became 3\.\d\d MiB \(\d\d%\)", lines[-1]), lines[-1]
    with Engine(tmp_path, EngineConfig(backend="reference", max_sequences=1)) as engine:
        result = engine.chat([{"role": "user", "content": "12 + 34"}], SamplingParams(temperature=0))
    assert "46" in (result.content or "")


def test_widths_that_nvfp4_cannot_hold_stay(tmp_path, capsys):
    """Experts of 40 wide halves: down has 40 inputs, so neither half is quantised; FP8 does not mind."""
    folder = make_checkpoint(tmp_path / "in", "ME", **SIZES | {"moe_intermediate_size": 40}).folder
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "no multiples of 16: layers.1.mixer.experts.0.up_proj, " in printed
    config = ModelConfig.load(tmp_path / "out")
    assert config.quantization.formats == {"fp8"} and not any(
        ".experts." in name for name in config.quantization.modules
    )
    load_model(tmp_path / "out")
    quantize_checkpoint(folder, tmp_path / "fp8", "fp8")
    assert isinstance(load_model(tmp_path / "fp8").layers[1].experts.down, Fp8)


def test_nothing_but_nvfp4_experts(original, tmp_path):
    """All else kept: the map names experts alone."""
    quantize_checkpoint(original, tmp_path / "out", "nvfp4", ["*in_proj", "*out_proj", "*shared_experts", "layers.3"])
    model = load_model(tmp_path / "out")
    assert isinstance(model.layers[1].experts.up, Nvfp4)
    assert model.config.quantization.formats == {"nvfp4"}


def test_refusals(original, tmp_path, capsys):
    out = tmp_path / "out"
    assert "'layers.9' means no module" in refuses(capsys, original, out, "--keep", "layers.9")
    assert "'lm_head' means no module" in refuses(capsys, original, out, "--keep", "lm_head")
    assert "quantised alike" in refuses(capsys, original, out, "--keep", "*experts.1.up_proj")
    assert "'int4'" in refuses(capsys, original, out, "--format", "int4")
    assert "config.json" in refuses(capsys, tmp_path / "nowhere", out)
    dense = make_checkpoint(tmp_path / "dense", "*").folder
    capsys.readouterr()
    assert "no module that nvfp4 would be for" in refuses(capsys, dense, out)
    assert not out.exists(), "a refusal writes nothing"
    quantize_checkpoint(original, out, "fp8")
    assert "quantised already: fp8" in refuses(capsys, out, tmp_path / "again")
    assert "is not an empty folder" in refuses(capsys, original, out)
    (tmp_path / "file").touch()
    assert "is not an empty folder" in refuses(capsys, original, tmp_path / "file")


def test_weights_that_are_not_finite_are_named(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "in", "M").folder
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.0.mixer.in_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    capsys.readouterr()
    error = refuses(capsys, folder, tmp_path / "out")
    assert str(folder) in error and "'layers.0.mixer.in_proj.weight'" in error and "not finite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "what is not whole is taken back"


def test_the_map_names_what_the_files_hold(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "out", "nvfp4")
    document = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    named = document["quantization"]["quantized_layers"]
    held = {entry.name for entries in list_tensors(tmp_path / "out").values() for entry in entries}
    assert named and {f"{name}.weight_scale" for name in named} <= held
    assert {entry.get("group_size") for entry in named.values() if entry["quant_algo"] == "NVFP4"} == {16}
    assert document["producer"]["name"] == "headrace"
    assert named.keys() <= {f"backbone.{name}" for name in modules(ModelConfig.load(original))}
