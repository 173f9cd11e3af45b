"""Rows of the kernel benchmarks as a table and a picture: ``python -m benchmarks.show ROWS.jsonl [--plot FILE.png]``.

A kernel's rate is the bytes it has to move over the median time: against the device's copy bandwidth it says how much
is left to win. The last row of a name counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The newest row of each benchmark, in the order of their first appearance. Raises ValueError naming a bad line."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["name"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a benchmark's row ({error!r})") from error
    return list(rows.values())


def rate(row: Row) -> float | None:
    """GB/s of the bytes that had to move, where the row says how many."""
    least = row["config"].get("minimum_bytes")
    return None if least is None else least / row["median_s"] / 1e9


def table(rows: list[Row]) -> Table:
    """One line a benchmark, under the devices and commits they come from."""
    sources = dict.fromkeys(f"{row['device']}, commit {row['commit']}" for row in rows)
    shown = Table("benchmark", "median", "quartiles", "GB/s", title="; ".join(sources))
    for row in rows:
        quartiles = f"{time_of(row['q1_s'])} - {time_of(row['q3_s'])}"
        speed = rate(row)
        name = escape(row["name"].removeprefix("test_"))
        shown.add_row(name, time_of(row["median_s"]), quartiles, "" if speed is None else f"{speed:.1f}")
    for column in shown.columns:
        column.no_wrap = True
    return shown


def time_of(seconds: float) -> str:
    """Seconds in a unit that reads well."""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def plot(rows: list[Row], path: Path) -> None:
    """GB/s per op, a bar for each number of rows. Raises ValueError if no row says how many bytes had to move."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if rate(row) is not None]
    if not timed:
        raise ValueError("none of the rows is a kernel's: there is nothing to plot")
    groups = list(dict.fromkeys((row["group"], row["config"]["op"]) for row in timed))
    sizes = sorted({row["config"]["rows"] for row in timed})
    figure, axes = pyplot.subplots(figsize=(1.6 + 0.75 * len(groups), 4.2), layout="constrained")
    width = 0.8 / len(sizes)
    for i, size in enumerate(sizes):
        bars = {(r["group"], r["config"]["op"]): rate(r) for r in timed if r["config"]["rows"] == size}
        places = [n for n, group in enumerate(groups) if group in bars]
        axes.bar(
            [n + (i - (len(sizes) - 1) / 2) * width for n in places],
            [bars[groups[n]] for n in places],
            width,
            label=f"{size} rows",
        )
    axes.set_xticks(range(len(groups)), [f"{op}\n({group})" for group, op in groups], rotation=40, ha="right")
    axes.set_ylabel("GB/s of the bytes that must move")
    axes.set_title(f"{timed[0]['device']}, {timed[0]['config'].get('shape', '')}, commit {timed[0]['commit']}")
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(
    path: Annotated[Path, typer.Argument(metavar="ROWS.jsonl", help="What the benchmarks wrote.")],
    picture: Annotated[Path | None, typer.Option("--plot", help="Also draw the kernels' rates.")] = None,
) -> None:
    """Show benchmark rows."""
    try:
        rows = read(path)
        Console().print(table(rows))
        if picture is not None:
            plot(rows, picture)
            print(f"wrote {picture}")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
