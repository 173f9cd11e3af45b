"""``headrace bench`` and what shows its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import show
from headrace.engine.cli import bench, main


def row(name: str, median: float, *, least: int | None = 1000, rows: int = 1, group: str = "decode") -> dict[str, Any]:
    config = {} if least is None else {"op": name, "rows": rows, "minimum_bytes": least, "shape": "an eighth"}
    return {
        "name": f"test_decode[{name}-{rows}]", "group": group, "median_s": median, "q1_s": median, "q3_s": 2 * median,
        "device": "a device", "commit": "abc", "config": config,
    }  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_the_last_row_of_a_name_counts(tmp_path: Path) -> None:
    rows = show.read(write(tmp_path / "rows", row("a", 1.0), row("b", 1.0), row("a", 2e-6)))
    assert [(one["config"]["op"], one["median_s"]) for one in rows] == [("a", 2e-6), ("b", 1.0)]
    assert show.rate(rows[0]) == pytest.approx(0.5)
    assert show.rate(row("c", 1.0, least=None)) is None


def test_the_table(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show.table([row("route", 25e-6), row("other", 0.0125, least=None)]))
    text = console.export_text()
    assert "decode[route-1]" in text
    assert "25 us - 50 us" in text
    assert "12.50 ms" in text
    assert "a device, commit abc" in text


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", row("a", 1.0))
    for bad in ("{", "3", '{"no": 1}'):
        path.write_text(path.read_text().splitlines()[0] + "\n" + bad + "\n")
        with pytest.raises(ValueError, match="line 2"):
            show.read(path)


def test_the_picture(tmp_path: Path) -> None:
    rows = [row("a", 1.0), row("a", 1.0, rows=8), row("b", 2.0, rows=8, group="prompt")]
    show.plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        show.plot([row("a", 1.0, least=None)], tmp_path / "p.png")


def test_bench_runs_and_shows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "p.png"
    assert main(["bench", "kernels", "-k", "route and 8", "--rows", str(file), "--plot", str(picture)]) == 0
    [written] = show.read(file)
    assert written["name"] == "test_decode[route-8]"
    assert written["median_s"] > 0
    assert picture.stat().st_size > 1000
    assert "decode[route-8]" in capfd.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["nothing"], "there are all, engine_step, host_step, kernels, sampler"),
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
