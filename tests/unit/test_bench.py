"""``headrace bench`` and what shows its rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import rows, show, timing
from benchmarks.timing import Limit
from headrace.engine.cli import bench, main


def row(name: str, median: float, *, least: int | None = 1000, rows: int = 1, group: str = "decode") -> dict[str, Any]:
    kernel = {
        "op": name, "rows": rows, "backend": "reference", "on": "cpu", "sizes": "eighth", "minimum_bytes": least,
        "flops": 0,
    }  # fmt: skip
    return {
        "name": f"test_decode[{name}-{rows}]", "group": group, "median_s": median, "q1_s": median, "q3_s": 2 * median,
        "device": "a device", "commit": "abc", "threads": 2, "run": "1", "config": {} if least is None else kernel,
    }  # fmt: skip


def header(run: str = "1", *, bytes_per_s: float, threads: int = 2) -> dict[str, Any]:
    limit = Limit("cpu", threads, bytes_per_s, "reading", 1e12, "a GEMM")
    return {"run": run, "limits": [asdict(limit)]}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_the_last_row_of_a_name_counts(tmp_path: Path) -> None:
    found = show.read(write(tmp_path / "rows", row("a", 1.0), row("b", 1.0), row("a", 2e-6)))
    assert [(one["config"]["op"], one["median_s"]) for one in found] == [("a", 2e-6), ("b", 1.0)]
    assert show.rate(found[0]) == pytest.approx(0.5)
    assert show.rate(row("c", 1.0, least=None)) is None


def test_a_row_is_read_against_the_limits_of_its_own_run(tmp_path: Path) -> None:
    lines = [
        header(bytes_per_s=1e9), row("a", 2e-6), row("b", 2e-6, least=None), {**row("d", 2e-6), "threads": 1},
        header("2", bytes_per_s=4e9), {**row("c", 2e-6), "run": "2"}, {**row("old", 1.0), "run": None},
    ]  # fmt: skip
    lines[1]["config"]["flops"] = 500_000  # 0.5 us at the header's rate: memory's 1 us is what counts
    lines[5]["config"]["flops"] = 500_000  # here it is more than memory's 0.25 us
    shares = {one["name"]: show.share(one) for one in show.read(write(tmp_path / "rows", *lines))}
    assert shares == {
        "test_decode[a-1]": pytest.approx(0.5), "test_decode[b-1]": None, "test_decode[d-1]": None,
        "test_decode[c-1]": pytest.approx(0.25), "test_decode[old-1]": None,
    }  # fmt: skip


def test_a_run_begins_with_one_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(device: torch.device) -> list[Limit]:
        measured.append(device)
        return [Limit("cpu", 1, 1e9, "reading", 1e9, "a GEMM")]

    monkeypatch.setattr(rows, "measure", measure)
    file = tmp_path / "deep" / "rows"
    for _ in range(2):
        run = rows.Rows(file, torch.device("cpu"))
        assert len(measured) in (0, 1), "nothing is measured before there is a row"
        run.add("a", "decode", [3.0, 1.0, 2.0], {})
        run.add("b", None, [5.0], {})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(measured) == 2
    assert ["limits" in line for line in lines] == [True, False, False] * 2
    assert lines[0]["run"] == lines[1]["run"] == lines[2]["run"] != lines[3]["run"]
    assert (lines[1]["q1_s"], lines[1]["median_s"], lines[1]["q3_s"], lines[1]["rounds"]) == (1.5, 2.0, 2.5, 3)
    assert (lines[2]["q1_s"], lines[2]["median_s"], lines[2]["q3_s"], lines[2]["rounds"]) == (5.0, 5.0, 5.0, 1)


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread and with torch's own number, which is the same afterwards."""
    monkeypatch.setattr(timing, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "GEMM", 64)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    with timing.threads(2):
        found = timing.measure(torch.device("cpu"))
        assert torch.get_num_threads() == 2
    assert [limit.threads for limit in found] == [1, 2]
    assert all(limit.bytes_per_s > 0 and limit.flops_per_s > 0 for limit in found)
    assert found[0].bytes_by == "sum over 1 MiB"
    with timing.threads(1):
        assert [limit.threads for limit in timing.measure(torch.device("cpu"))] == [1]


def test_the_table(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    file = write(tmp_path / "rows", header(bytes_per_s=1e9), row("route", 25e-6), row("other", 0.0125, least=None))
    console.print(show.table(show.read(file)))
    text = console.export_text()
    assert "decode[route-1]" in text
    assert "25 us - 50 us" in text
    assert "12.50 ms" in text
    assert "a device, commit abc" in text
    assert "0.04" in text, "1 us of 25"
    assert "cpu, threads: 2: 1.0 GB/s (reading), 1000 GFLOP/s (a GEMM)" in text


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", row("a", 1.0))
    for bad in ("{", "3", '{"no": 1}', '{"run": "1", "limits": [{"speed": 1}]}'):
        path.write_text(path.read_text().splitlines()[0] + "\n" + bad + "\n")
        with pytest.raises(ValueError, match="line 2"):
            show.read(path)


def test_the_picture(tmp_path: Path) -> None:
    kernels = [row("a", 1.0), row("a", 1.0, rows=8), row("b", 2.0, rows=8, group="prompt")]
    show.plot(kernels, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        show.plot([row("a", 1.0, least=None)], tmp_path / "p.png")


def test_bench_runs_and_shows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "p.png"
    assert main(["bench", "kernels", "-k", "reference-route-8", "--rows", str(file), "--plot", str(picture)]) == 0
    [written] = show.read(file)
    assert written["name"] == "test_decode[reference-route-8]"
    assert written["median_s"] > 0
    assert show.share(written)
    assert picture.stat().st_size > 1000
    assert "decode[reference-route-8]" in capfd.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["nothing"], "there are all, engine_step, host_step, kernels"),
    (["kernels", "-k", "no_such_op"], "matches 'no_such_op'"),
])  # fmt: skip
def test_what_is_not_there(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capfd.readouterr().err


def test_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import headrace.kernels

    monkeypatch.setattr(headrace.kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["bench"]) == 2
    assert "pip install" in capsys.readouterr().err
