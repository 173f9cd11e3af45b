"""Rows of a load as markdown and as a picture. Everything shown is measured; ratios are of turns of one round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.scenarios import CAPACITY, HTTP, OVERLOAD, PYTHON
from benchmarks.load.workload import Row

LATENCIES = ("ttft", "inter_token", "gap", "e2e")


def ratios(rows: Sequence[Row]) -> list[float]:
    """Tokens per second over HTTP as a share of the Python API's, for each round of pairs."""
    rates = {(row["scenario"], row["round"], row["measure"]): row["tokens_per_s"] for row in rows}
    return [
        rate / rates[name, number, PYTHON]
        for (name, number, measure), rate in rates.items()
        if measure == HTTP and (name, number, PYTHON) in rates
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Tables of rates and latencies, then what was seen beside them."""
    rates = [
        [label(row), f"{row['answered']} of {row['requests']}", f"{row['tokens_per_s']:.0f}",
         f"{row['tokens'] / row['arrivals']:.2f}" if row["arrivals"] else "-", cpu(row), f"{row['load_average'][0]}"]
        for row in rows
    ]  # fmt: skip
    headings = ["load", "answered", "tokens/s", "tokens an event", "cores busy", "load average"]
    latencies = [[label(row), *(times(row[f"{name}_s"]) for name in LATENCIES)] for row in rows]
    parts = [
        grid(headings, rates),
        "Milliseconds, p50 / p90 / p99:\n\n" + grid(["load", "first token", "per token", "gap", "whole"], latencies),
    ]
    lines = [*ratio_lines(rows), *memory_lines(rows), *overload_lines(rows), *error_lines(rows)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]).strip() + "\n"


def label(row: Row) -> str:
    """A row's name in a table."""
    return f"{row['scenario']}, {row['measure']}" + (f", round {row['round']}" if row["round"] else "")


def times(figures: Row | None) -> str:
    """Percentiles in milliseconds."""
    return "-" if figures is None else " / ".join(f"{1e3 * value:.4g}" for value in figures.values())


def cpu(row: Row) -> str:
    """Cores that each process kept busy, on average."""
    return ", ".join(f"{name} {seconds / row['seconds']:.2f}" for name, seconds in row["cpu_s"].items())


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def ratio_lines(rows: Sequence[Row]) -> list[str]:
    """HTTP beside the Python API."""
    found = ratios(rows)
    if not found:
        return []
    listed = ", ".join(f"{ratio:.3f}" for ratio in found)
    return [f"HTTP gives {statistics.median(found):.1%} of the Python API's tokens/s (median of rounds: {listed})"]


def memory_lines(rows: Sequence[Row]) -> list[str]:
    """The server's memory."""
    return [
        f"{label(row)}: the server's resident set was at most {row['memory_peak_bytes'] / 1e6:.1f} MB and grew by "
        f"{row['memory_bytes_per_minute'] / 1e6:+.3f} MB a minute once settled"
        for row in rows
        if "memory_peak_bytes" in row
    ]


def overload_lines(rows: Sequence[Row]) -> list[str]:
    """What overload did to those who were admitted, and to those who were not."""
    by_measure = {row["measure"]: row for row in rows if row["scenario"] == "overload"}
    full, over = by_measure.get(CAPACITY), by_measure.get(OVERLOAD)
    if full is None or over is None:
        return []
    lines = [
        f"overload: {name} of admitted requests at p50 / p99 is {_multiple(over, full, key, 'p50')} / "
        f"{_multiple(over, full, key, 'p99')} times that at capacity"
        for name, key in (("the time per token", "inter_token_s"), ("the whole time", "e2e_s"))
        if over[key] and full[key]
    ]
    if over["refused_s"] and over["retry_after_s"]:
        after = over["retry_after_s"]
        lines.append(
            f"overload: 429 came within {times(over['refused_s'])} ms (p50 / p90 / p99), Retry-After "
            f"{after['least']:g} to {after['most']:g} s, missing in {over['refused_without_retry_after']}"
        )
    return lines


def _multiple(over: Row, full: Row, key: str, percentile: str) -> str:
    base = full[key][percentile]
    return f"{over[key][percentile] / base:.2f}" if base else "-"


def error_lines(rows: Sequence[Row]) -> list[str]:
    """What went wrong, if anything."""
    return [f"{label(row)}: {count} x {error}" for row in rows for error, count in row["errors"].items()]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Rates, latencies by percentile (logarithmic), and the server's memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [row for row in rows if row.get("memory")]
    names = [label(row) for row in rows]
    figure, panels = pyplot.subplots(
        1, 3 if curves else 2, figsize=(14 if curves else 10, 1.6 + 0.55 * max(len(rows), 4)), layout="constrained"
    )
    panels[0].barh(names, [row["tokens_per_s"] for row in rows], color="tab:green")
    panels[0].invert_yaxis()
    panels[0].set_xlabel("tokens per second")
    _latencies(panels[1], rows, names)
    for row in curves:
        panels[2].plot(*zip(*((seconds, size / 1e6) for seconds, size in row["memory"]), strict=True), label=label(row))
        panels[2].set_xlabel("seconds")
        panels[2].set_ylabel("server's resident set, MB")
        panels[2].legend(fontsize=7)
    first = rows[0]
    figure.suptitle(f"{first['device']}, commit {first['commit']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _latencies(panel: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A line from p50 over p90 to p99 for each latency of each row."""
    colours = dict(zip((*LATENCIES, "refused"), ("tab:blue", "tab:green", "tab:gray", "tab:red", "black"), strict=True))
    for place, row in enumerate(rows):
        for shift, (name, colour) in enumerate(colours.items()):
            if found := row[f"{name}_s"]:
                values = [max(1e3 * value, 1e-3) for value in found.values()]
                heights = [place + 0.15 * (shift - 2)] * len(values)
                panel.plot(values, heights, marker="|", color=colour, label=None if place else name)
    panel.set_xscale("log")
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("milliseconds: p50, p90, p99")
    handles = [panel.plot([], [], color=colour, label=name)[0] for name, colour in colours.items()]
    panel.legend(handles=handles, fontsize=7)
