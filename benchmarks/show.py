"""Rows of the kernel benchmarks as a table and a picture: ``python -m benchmarks.show ROWS.jsonl [--plot FILE.png]``.

A kernel's rate is the bytes it has to move over the median time. "Of limits" is the least time in which the machine
could do it, at the rates for memory and for arithmetic measured in the same run, over the median time: it says how much
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

from benchmarks.timing import Limit

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The newest row of each benchmark, in the order of their first appearance, with its run's ``limits``.

    Raises ValueError naming a bad line.
    """
    rows: dict[str, Row] = {}
    limits: dict[str, list[Limit]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            if "limits" in row:
                limits[row["run"]] = [Limit(**limit) for limit in row["limits"]]
            else:
                rows[row["name"]] = {**row, "limits": limits.get(row.get("run"), [])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a benchmark's row ({error!r})") from error
    return list(rows.values())


def rate(row: Row) -> float | None:
    """GB/s of the bytes that had to move, where the row says how many."""
    least = row["config"].get("minimum_bytes")
    return None if least is None else float(least / row["median_s"] / 1e9)


def share(row: Row) -> float | None:
    """The least time that the run's limits allow over the median; None where either is not known."""
    config = row["config"]
    for limit in row["limits"]:
        if limit.device == config.get("on") and limit.threads in (None, row["threads"]):
            return float(limit.seconds(config["minimum_bytes"], config["flops"]) / row["median_s"])
    return None


def table(rows: list[Row]) -> Table:
    """One line a benchmark, under the devices, commits and limits they come from."""
    sources = dict.fromkeys(f"{row['device']}, commit {row['commit']}" for row in rows)
    limits = dict.fromkeys(line_of(limit) for row in rows for limit in row["limits"])
    columns = ("benchmark", "median", "quartiles", "GB/s", "of limits")
    shown = Table(*columns, title="; ".join(sources), caption="\n".join(limits) or None)
    for row in rows:
        quartiles = f"{time_of(row['q1_s'])} - {time_of(row['q3_s'])}"
        speed, part = rate(row), share(row)
        shown.add_row(
            escape(row["name"].removeprefix("test_")),
            time_of(row["median_s"]),
            quartiles,
            "" if speed is None else f"{speed:.1f}",
            "" if part is None else f"{part:.2f}",
        )
    for column in shown.columns:
        column.no_wrap = True
    return shown


def line_of(limit: Limit) -> str:
    """A limit in words."""
    by = limit.device if limit.threads is None else f"{limit.device}, threads: {limit.threads}"
    return (
        f"{by}: {limit.bytes_per_s / 1e9:.1f} GB/s ({limit.bytes_by}), {limit.flops_per_s / 1e9:.0f} GFLOP/s "
        f"({limit.flops_by})"
    )


def time_of(seconds: float) -> str:
    """Seconds in a unit that reads well."""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def plot(rows: list[Row], path: Path) -> None:
    """GB/s per op and backend, a bar for each number of rows.

    Raises ValueError if no row says how many bytes had to move.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if rate(row) is not None]
    if not timed:
        raise ValueError("none of the rows is a kernel's: there is nothing to plot")
    groups = list(dict.fromkeys(map(_place, timed)))
    sizes = sorted({row["config"]["rows"] for row in timed})
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.35 * len(groups)), layout="constrained")
    height = 0.8 / len(sizes)
    for i, size in enumerate(sizes):
        bars = {_place(row): rate(row) or 0.0 for row in timed if row["config"]["rows"] == size}
        places = [n + (i - (len(sizes) - 1) / 2) * height for n, group in enumerate(groups) if group in bars]
        axes.barh(places, [bars[group] for group in groups if group in bars], height, label=f"{size} rows")
    axes.set_yticks(range(len(groups)), [f"{op} ({group}, {backend})" for group, op, backend in groups])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("GB/s of the bytes that must move")
    axes.set_title(f"{timed[0]['device']}, {timed[0]['config']['sizes']} sizes, commit {timed[0]['commit']}")
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _place(row: Row) -> tuple[str, str, str]:
    config = row["config"]
    return row["group"], config["op"], config["backend"]


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
