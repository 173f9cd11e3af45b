"""Rows of a comparison as a table and a picture. Everything shown is measured; ratios are of turns of one round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.workload import Row

OURS = "headrace"
Series = dict[int, float]  # round -> tokens per second
Table = dict[str, dict[str, Series]]  # label -> measure -> series


def series(rows: Sequence[Row]) -> Table:
    """Tokens per second by peer and measure; of several rows of one round, their median."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        if "tokens_per_s" in row:
            rounds = found.setdefault(label(row), {}).setdefault(row["measure"], {})
            rounds.setdefault(row["round"], []).append(row["tokens_per_s"])
    return {
        name: {
            measure: {number: statistics.median(values) for number, values in rounds.items()}
            for measure, rounds in measures.items()
        }
        for name, measures in found.items()
    }


def label(row: Row) -> str:
    """A peer, what it keeps weights in, its threads, and what has to be said beside its name."""
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['peer']} {row['format']}, {threads}" + (f" ({row['note']})" if "note" in row else "")


def ratio(ours: Series, theirs: Series) -> float | None:
    """How many times as fast we are: the median over the rounds that both ran; None where there is no such round."""
    both = ours.keys() & theirs.keys()
    return statistics.median(ours[number] / theirs[number] for number in both) if both else None


def our_labels(table: Table) -> list[str]:
    """The series that others are compared with: each of ours with most threads."""
    found: dict[str, tuple[int, str]] = {}
    for name in table:
        if name.startswith(OURS):
            threads = int(name.split(", ")[1].split()[0])
            found[name.split()[0]] = max(found.get(name.split()[0], (0, "")), (threads, name))
    return [name for _, name in found.values()]


def markdown(rows: Sequence[Row]) -> str:
    """The comparison: tokens per second, ratios, then what was recorded beside them."""
    table = series(rows)
    measures = list(dict.fromkeys(measure for one in table.values() for measure in one))
    parts = [
        "Tokens per second: median (least - most) of the rounds.\n\n"
        + grid(["peer", *measures], [[name, *(spread(one.get(m)) for m in measures)] for name, one in table.items()])
    ]
    for ours in our_labels(table) if len(table) > 1 else []:
        others = [
            [name, *(times(ratio(table[ours].get(m, {}), one.get(m, {}))) for m in measures)]
            for name, one in table.items()
            if name != ours
        ]
        parts.append(f"{ours}, as a multiple of:\n\n" + grid(["peer", *measures], others))
    for title, make in (
        ("Weights read while decoding alone", weight_rates), ("Read bandwidth of the machine", bandwidth),
        ("Loading", loading), ("Versions", versions), ("Not measured", failures),
    ):  # fmt: skip
        if lines := make(rows):
            parts.append(f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def spread(values: Series | None) -> str:
    if not values:
        return "-"
    digits = 1 if statistics.median(values.values()) < 1000 else 0
    low, middle, high = min(values.values()), statistics.median(values.values()), max(values.values())
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def loading(rows: Sequence[Row]) -> list[str]:
    """Medians of the time to load against reading the files once, and of the memory."""
    loads, memory = by_label(rows, "load"), by_label(rows, "memory")
    lines = []
    for name, found in loads.items():
        seconds = statistics.median(row["seconds"] for row in found)
        multiple = statistics.median(row["seconds"] / row["read_seconds"] for row in found)
        line = f"{name}: {seconds:.2f} s, {multiple:.1f} times as long as reading the files once"
        if name in memory:
            size = found[0]["bytes"]
            peaks = [max(row[key] for row in memory[name]) for key in ("loading_bytes", "serving_bytes")]
            shares = [f"{peak / 1e9:.2f} GB ({peak / size:.2f} of the weights' files)" for peak in peaks]
            line += f"; largest resident set while loading {shares[0]}, while serving {shares[1]}"
        lines.append(line)
    return lines


def bandwidths(rows: Sequence[Row]) -> dict[int, list[float]]:
    """GB/s by threads, as measured between the rounds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["measure"] == "bandwidth":
            found.setdefault(row["threads"], []).append(row["bytes_per_s"] / 1e9)
    return dict(sorted(found.items()))


def bandwidth(rows: Sequence[Row]) -> list[str]:
    return [
        f"{threads} thread{'s' if threads > 1 else ''}: {statistics.median(values):.1f} GB/s "
        f"({min(values):.1f} - {max(values):.1f}) between the rounds"
        for threads, values in bandwidths(rows).items()
    ]


def weight_rates(rows: Sequence[Row]) -> list[str]:
    """GB/s of the weights that a token reads, and their share of the bandwidth the same threads were seen to have."""
    limits = bandwidths(rows)
    lines = []
    for name, found in by_label(rows, "decode B=1").items():
        first = found[0]
        if "weight_bytes_per_token" in first:
            rate = statistics.median(row["tokens_per_s"] for row in found) * first["weight_bytes_per_token"] / 1e9
            line = f"{name}: {rate:.1f} GB/s"
            if first["threads"] in limits:
                line += f", {rate / statistics.median(limits[first['threads']]):.0%} of the read bandwidth"
            lines.append(line)
    return lines


def versions(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row['peer']}: {row['version']}" for row in rows if "version" in row))


def failures(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row['peer']}: {row['error']}" for row in rows if "error" in row))


def by_label(rows: Sequence[Row], measure: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["measure"] == measure:
            found.setdefault(label(row), []).append(row)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each measure, a bar for each peer; the whiskers span the rounds. ValueError without rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = series(rows)
    measures = list(dict.fromkeys(measure for one in table.values() for measure in one))
    if not measures:
        raise ValueError("no turn gave a figure: there is nothing to plot")
    names, ours = list(table), our_labels(table)
    size = (1.5 + 2.6 * len(measures), 1.4 + 0.45 * len(names))
    figure, panels = pyplot.subplots(1, len(measures), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=True):
        for place, name in enumerate(names):
            values = list(table[name].get(measure, {}).values())
            if values:
                middle = statistics.median(values)
                whiskers = [[middle - min(values)], [max(values) - middle]]
                colour = "tab:green" if name in ours else "tab:gray"
                panel.barh(place, middle, xerr=whiskers, color=colour, ecolor="black", capsize=2)
                panel.annotate(f"{middle:.3g}", (middle, place), xytext=(4, 6), textcoords="offset points", fontsize=8)
        panel.set_title(measure)
        panel.set_xlabel("tokens per second")
        panel.margins(x=0.22)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    machine = next(row for row in rows if "tokens_per_s" in row)
    figure.suptitle(f"{machine['device']}, {machine['isa']}, commit {machine['commit']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
