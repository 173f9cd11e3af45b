"""The table's machinery on a small registry: rows, bars, readable differences, another Triton."""

import json
import subprocess
import sys

import lab_kernels
import pytest
import torch

from headrace.kernels.lab import cases as registry
from headrace.kernels.lab import table
from headrace.kernels.lab.cases import Case, coordinates, sampled
from headrace.kernels.lab.launches import capture


def product(batch: int, offset: int = 0, **changes) -> Case:
    """One product of ``batch`` tokens with a [2048, 1024] weight of which only the sampled rows are read."""

    def make():
        x = torch.zeros(batch, 1024, dtype=torch.bfloat16)
        weight = torch.empty(2048 * 1024 + 8, dtype=torch.bfloat16)[offset:]
        out = torch.empty(batch, 2048)

        def operation():
            lab_kernels.multiply[(32,)](
                x, weight, out, 1024, 2048, TOKENS=batch, BLOCK_N=64, BLOCK_K=64, num_stages=4, enable_fp_fusion=False
            )

        return operation

    least = 2 * 2048 * 1024 + 2 * batch * 1024 + 4 * batch * 2048
    settings = {"minimum_bytes": least, "streamed": ("weight",), "architectures": (90,)} | changes
    return Case(name=f"product batch {batch}", op="product", make=make, **settings)


def test_a_row_of_a_sampled_case():
    case = product(16)
    row = table.measure(case, 90, count=True)
    (launch,) = row["launches"]
    assert (launch["kernel"], launch["grid"], launch["spills"]) == ("multiply", "32x1x1", 0)
    assert launch["wide"] == {"weight": {"128": launch["wide"]["weight"]["128"]}}
    assert launch["in_flight_per_sm"] == pytest.approx(3 * 64 * (64 + 16) * 2 * 32 / 132, rel=0.05)
    assert row["ratio"] == 1.0 and row["moved"] == case.minimum_bytes
    assert table.problems(case, 90, row) == []
    assert json.loads(json.dumps(row)) == row


def test_bars_are_named():
    case = product(16, minimum_bytes=10**6, least_in_flight=20_000)
    row = table.measure(case, 90, count=True)
    row["launches"][0]["spills"] = 3
    found = "\n".join(table.problems(case, 90, row))
    assert "product batch 16, sm_90, multiply: 3 spills" in found
    assert "bytes in flight per SM, not 20000" in found
    assert "moves 4.3581 of the least bytes, more than 1.1" in found
    assert "spills" not in "\n".join(table.problems(case, 120, row))


def test_narrow_loads_are_named():
    case = product(16, offset=1, minimum_bytes=None)
    row = table.measure(case, 90, count=True)
    assert "ratio" not in row
    (problem,) = table.problems(case, 90, row)
    assert "loads of weight narrower than 128 bits" in problem


def test_differences_are_readable():
    before = {
        "a": {"sm_90": {"launches": [{"kernel": "k", "registers": 96, "mma": {"HMMA": 4}}], "ratio": 1.0}},
        "b": {},
    }
    after = {"a": {"sm_90": {"launches": [{"kernel": "k", "registers": 104, "mma": {}}], "ratio": 1.2}}, "c": {}}
    assert table.differences(before, before) == []
    assert table.differences(before, after) == [
        "a, sm_90, k: mma: HMMA 4 -> null",
        "a, sm_90, k: registers 96 -> 104",
        "a, sm_90: ratio 1.0 -> 1.2",
        "b: gone",
        "c: not stored",
    ]


def test_the_file_holds_what_was_measured(tmp_path):
    rows = table.build([product(8), product(16)], count=False)
    path = tmp_path / "table.json"
    table.write({"3.9.0": rows, "3.6.0": {}}, path)
    assert table.read(path) == {"3.9.0": rows, "3.6.0": {}}
    assert table.read(tmp_path / "none") == {}


def test_samples():
    with capture(90) as launches:
        lab_kernels.scale[(3, 2, 2)](torch.empty(8), torch.empty(8), 8, 1.0, BLOCK=8)
        lab_kernels.scale[(100, 7)](torch.empty(8), torch.empty(8), 8, 1.0, BLOCK=8)
    small, large = (sampled(launch) for launch in launches)
    assert len(small) == 12 and set(small.values()) == {1.0} and (2, 1, 1) in small
    assert len(large) == 8 and sum(large.values()) == pytest.approx(700)
    assert coordinates(699, (100, 7, 1)) == (99, 6, 0)


def test_two_cases_of_one_name(monkeypatch):
    monkeypatch.setattr(registry, "modules", lambda: ["lab_kernels"])
    monkeypatch.setattr(lab_kernels, "CASES", (product(8), product(8)), raising=False)
    with pytest.raises(ValueError, match="two cases are called 'product batch 8'"):
        registry.collect()
    with pytest.raises(ValueError, match="not positive"):
        product(8, minimum_bytes=0)


def test_a_failing_other_process_says_why(monkeypatch, tmp_path):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setattr(table, "other_triton", lambda version: tmp_path)
    with pytest.raises(RuntimeError, match="not this one"):
        table.build_with("3.6.0")


def test_the_command_line_asks_for_known_cases():
    command = [sys.executable, "-m", "headrace.kernels.lab.table", "--rows", "--case", "no such case"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["rows"] == {}
