"""The table of what quantisation costs: its measures on known distributions, and a small run from end to end."""

import math

import pytest
import torch

from benchmarks import quality


def test_measures():
    """Two positions over two tokens, by hand."""
    old = [torch.tensor([[1.0, -1.0]]).double(), torch.tensor([[0.5, -0.5]]).double()]
    assert quality.compare(old, old) == (0.0, 0.0, 1.0)
    new = [torch.tensor([[1.0, -1.0]]).double(), torch.tensor([[-0.5, 0.5]]).double()]
    error, divergence, agreement = quality.compare(old, new)
    p = 1 / (1 + math.exp(-1))
    assert error == pytest.approx(math.sqrt(2 / 2.5))
    assert divergence == pytest.approx((p - (1 - p)) * 1 / 2)
    assert agreement == 0.5


def test_a_small_run(monkeypatch):
    monkeypatch.setattr(quality, "CATEGORIES", ("add",))
    monkeypatch.setattr(quality, "VARIANTS", {"float": ("float", "auto"), "nvfp4, fp8 KV": ("nvfp4", "fp8")})
    before, after = quality.measure(quality.MODEL, 2, 2026)
    assert (before.logit_error, before.divergence, before.agreement) == (0.0, 0.0, 1.0)
    assert before.accuracy["add"] == 1.0
    assert 1e-3 < after.logit_error < 0.3 and 0 < after.divergence < 0.05 and after.agreement > 0.9
    assert after.weights_bytes < 0.7 * before.weights_bytes
    assert [column.header for column in quality.table([before, after]).columns][-1] == "add"
