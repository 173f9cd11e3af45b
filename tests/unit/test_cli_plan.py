"""``headrace plan``: what it predicts, against figures counted by other means, and what it says when nothing fits."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from published import NANO, SUPER

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from published_checkpoint import quantised

from headrace.engine.cli import main
from headrace.engine.cli.planning import GPUS, _distinct
from headrace.engine.config import ModelConfig

MEMORY = 4.8e12  # of an H200, bytes/s


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .json files of the release that is quantised."""
    folder = tmp_path_factory.mktemp("nvfp4")
    metadata = {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": quantised(),
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**SUPER, "quantization_config": metadata}))
    return folder


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    (folder / "config.json").write_text(json.dumps(SUPER))
    return folder


def planned(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    assert main(["plan", "--json", *map(str, argv)]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def weights_read(plan: dict[str, Any]) -> float:
    """Bytes of a step on an H200."""
    others = ("Mamba state", "KV cache", "arithmetic", "launches")
    return sum(seconds for part, seconds in plan["seconds"].items() if part not in others) * MEMORY


def test_bytes_of_a_step_of_one_sequence(nvfp4: Path, bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12.65 GB for the NVFP4 release and 24.47 GB for the bf16 one, as counted by others from the published headers."""
    one = planned(capsys, nvfp4, "--batch", 1, "--context", 2048)["without MTP"]
    assert weights_read(one) / 1e9 == pytest.approx(12.65, abs=0.02)
    assert one["limit"] != "routed experts"
    bf16_step = planned(capsys, bf16, "--batch", 1, "--context", 2048, "--gpu", "h200", "--tp", 2)["without MTP"]
    assert 2 * weights_read(bf16_step) / 1e9 == pytest.approx(24.47, abs=0.02)


def test_memory_of_the_release(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = planned(capsys, nvfp4)
    with_mtp, without = plans["with MTP"], plans["without MTP"]
    assert sum(with_mtp["weights"].values()) == 80_297_329_824
    assert sum(with_mtp["weights"].values()) - sum(without["weights"].values()) == with_mtp["weights"]["MTP module"]
    # 160 MiB of fp32 state and four entries of the convolution's ring in bf16, for 32 sequences and 7 padding rows.
    assert without["state_bytes"] == 39 * 40 * (4 * 128 * 64 * 128 + 2 * 4 * 10240)
    assert without["slots"] == 32
    assert without["pages"] * 16 >= 32 * 8192
    assert without["longest_context"] == 262144
    assert with_mtp["step_seconds"] > without["step_seconds"]
    assert with_mtp["tokens_per_second"] > without["tokens_per_second"]


def test_experts_that_a_batch_picks() -> None:
    """The formula against dice."""
    config, dice = ModelConfig.from_json(SUPER), random.Random(0)
    for rows in (1, 8, 32):
        picked = [len({e for _ in range(rows) for e in dice.sample(range(512), 22)}) for _ in range(100)]
        assert _distinct(config, rows) * 512 == pytest.approx(sum(picked) / 100, rel=0.02)


def test_it_says_when_it_does_not_fit_and_what_would(bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = planned(capsys, bf16, "--gpu", "h100", status=1)
    for plan in plans.values():
        assert not plan["fits"]
        assert plan["what_would"] == ["--tp 4"]
    assert main(["plan", str(bf16), "--gpu", "h100"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit: the weights take 224.8 GiB a device" in shown
    assert "what would: --tp 4" in shown
    fits = planned(capsys, bf16, "--gpu", "h100", "--tp", 4)
    assert all(plan["fits"] for plan in fits.values())


def test_keys_and_values_take_what_the_checkpoint_says(
    nvfp4: Path, bf16: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 layers of 2 x 2 heads of 128: 4 KiB a token in fp8, 8 in bf16; an A100 has no fp8."""
    for folder, gpu, token in ((nvfp4, "h200", 4096), (nvfp4, "a100", 8192), (bf16, "b200", 8192)):
        plan = planned(capsys, folder, "--gpu", gpu, "--tp", 2, "--context", 1600, "--batch", 1)["without MTP"]
        assert plan["page_bytes"] == plan["pages"] * 16 * token // 2


def test_the_release_on_one_h100(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """69.3 GiB of weights leave little, but 32 sequences of 8,192 tokens have 6.2 GiB of state and 1 of pages."""
    plans = planned(capsys, nvfp4, "--gpu", "h100", "--context", 8192, "--batch", 32)
    assert plans["without MTP"]["fits"]
    assert plans["without MTP"]["most_slots"] >= 32
    assert not plans["with MTP"]["fits"]
    assert sum(plans["with MTP"]["weights"].values()) == 80_297_329_824
    more = planned(capsys, nvfp4, "--gpu", "h100", "--batch", plans["without MTP"]["most_slots"])
    assert more["without MTP"]["fits"]
    too_many = planned(capsys, nvfp4, "--gpu", "h100", "--batch", plans["without MTP"]["most_slots"] + 1, status=1)
    assert not too_many["without MTP"]["fits"]


def test_every_change_it_names_does_fit(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--gpu", "h100", "--batch", "256", "--context", "65536"]
    plans = planned(capsys, nvfp4, *asked, status=1)
    assert plans["without MTP"]["what_would"]
    for change in plans["without MTP"]["what_would"]:
        option, value = change.split()
        assert planned(capsys, nvfp4, *asked, option, value)["without MTP"]["fits"], change


def test_tables(nvfp4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(nvfp4), "--gpu", "b200"]) == 0
    shown = capsys.readouterr().out
    assert "predicted, not measured" in shown
    for line in (
        "routed experts",
        "KV in fp8, 16,384 pages of 16 tokens",
        "slots that fit with that context",
        "a decode step, at best",
        "limited by",
    ):
        assert line in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpu", "h300"], "--gpu must be one of a100"),
        (["--tp", "3"], "--tp must be one of 1, 2, 4, 8, got 3"),
        (["--context", "300000"], "--context 300000 is more than the model's 262144"),
    ],
)
def test_bad_options(bf16: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert main(["plan", str(bf16), *argv]) == 2
    assert said in capsys.readouterr().err


def test_nano_has_no_mtp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NANO))
    assert list(planned(capsys, tmp_path, "--gpu", "h100")) == ["plan"]
    assert set(GPUS) >= {"h100", "h200", "b200"}
