"""The GPU report on a CPU: it must not call a broken kernel right, nor lose what it knows."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu_report, ops
from headrace.kernels import linear


def test_a_nan_is_not_a_small_error():
    good = [torch.ones(3, dtype=torch.float64)]
    assert gpu_report.error(good, good) == 0
    assert gpu_report.error([good[0] * 1.5], good) == pytest.approx(0.5)
    assert torch.tensor(gpu_report.error([good[0], good[0] * torch.nan], good * 2)).isnan()
    with pytest.raises(ValueError, match="shape"):
        gpu_report.error([torch.ones(1, dtype=torch.float64)], good)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The report over two ops of one size, without the engine."""
    monkeypatch.setattr(gpu_report, "DECODE", {"route": ops.route, "o_proj": ops.o_proj})
    monkeypatch.setattr(gpu_report, "PROMPT", {})
    monkeypatch.setattr(gpu_report, "engine_runs", lambda config: iter([("1", "2", "1 of 1")]))
    monkeypatch.setattr(gpu_report, "copy_bandwidth", lambda timer: 1e9)
    app = gpu_report.typer.Typer()
    app.command()(gpu_report.main)
    file = tmp_path / "report.md"
    result = CliRunner().invoke(app, ["--device", "cpu", "--out", str(file)])
    return result.exit_code, file.read_text()


def test_a_trial_run(tmp_path, monkeypatch):
    status, text = run(tmp_path, monkeypatch)
    assert status == 0
    assert "| decode | route | float32 | 0.0e+00 | ok |" in text
    assert "| 1 | 2 | 1 of 1 |" in text
    assert text.count("| decode | o_proj |") == 2 + 2


def test_wrong_and_failing_kernels_show(tmp_path, monkeypatch):
    calls = []

    def broken(*args, **kwargs):
        calls.append(0)
        if len(calls) == 1:
            return linear.linear(*args, **kwargs) * 1.5
        if len(calls) == 3:
            raise RuntimeError("out of resources")
        return linear.linear(*args, **kwargs)

    kernels = gpu_report.select("reference")
    monkeypatch.setattr(gpu_report, "select", lambda name: gpu_report_kernels(kernels, broken))
    status, text = run(tmp_path, monkeypatch)
    assert status == 1
    assert "| decode | o_proj | float32 |" in text
    assert "WRONG" in text
    assert "| RuntimeError: out of resources | FAILED |" in text


def gpu_report_kernels(kernels, broken):
    from dataclasses import replace

    return replace(kernels, linear=broken)
