"""The checked-in table: what every case's kernels cost, per architecture and Triton version.

    python -m headrace.kernels.lab.table                 # compare with table.json, exit 1 on a difference
    python -m headrace.kernels.lab.table --update        # write it
    python -m headrace.kernels.lab.table --case experts  # print the rows of some cases

Every case is compiled for each of its architectures by the newest Triton and by the oldest one supported; with the
newest, cases that state what they must move are also executed (a sample of their CTAs) and their bytes counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton

from headrace.kernels.lab import cases as registry
from headrace.kernels.lab.cases import Case
from headrace.kernels.lab.compile import LIMITS, Compiled, compile_launch
from headrace.kernels.lab.launches import Launch, divert
from headrace.kernels.lab.ptx import Statistics, load_widths, run

TABLE = Path(__file__).with_name("table.json")
NEWEST, OLDEST = "3.9.0", "3.6.0"
COUNTED = (90,)  # architectures on which cases are executed: mma.sync and cp.async code is alike on all of them
WITHOUT_SPILLS = (90, 100)  # architectures whose kernels must not spill
WIDE = 128  # bits a lane

Row = dict[str, Any]
Rows = dict[str, dict[str, Row]]  # case -> "sm_90" -> row


def measure(case: Case, arch: int, *, count: bool) -> Row:
    """One row: resources of every launch of the case in order, and what they move if ``count``."""
    counted = count and case.minimum_bytes is not None
    launches: list[Row] = []
    moved = 0.0

    def receive(launch: Launch) -> None:
        nonlocal moved
        compiled = compile_launch(launch)
        row = static_row(case, launch, compiled)
        if counted:
            sample = case.sample(launch) if case.sample else registry.sampled(launch)
            statistics = run(compiled, launch, sample)
            row["in_flight_per_sm"] = in_flight_per_sm(compiled, statistics)
            moved += statistics.moved(case.streamed)
        launches.append(row)

    operation = case.make()
    try:
        with divert(arch, receive):
            operation()
    except Exception as error:
        error.add_note(f"in case {case.name!r} on sm_{arch}")
        raise
    row: Row = {"launches": launches}
    if counted and case.minimum_bytes is not None:
        row["moved"] = round(moved)
        row["ratio"] = round(moved / case.minimum_bytes, 4)
    return row


def static_row(case: Case, launch: Launch, compiled: Compiled) -> Row:
    """What the machine code of one launch says."""
    report = compiled.report()
    streamed = set(case.wide or case.streamed)
    widths = load_widths(compiled, launch)
    return {
        "kernel": launch.name,
        "grid": "x".join(str(extent) for extent in launch.grid),
        "warps": launch.options.num_warps,
        "registers": report.registers,
        "spills": report.spills,
        "shared": report.shared_bytes,
        "occupancy": report.occupancy,
        "loads": _texts(report.loads),
        "async_loads": _texts(report.async_loads),
        "mma": dict(report.mma),
        "wide": {name: _texts(widths[name]) for name in sorted(streamed & set(widths))},
    }


def in_flight_per_sm(compiled: Compiled, statistics: Statistics) -> int:
    """Bytes in flight on an SM: those of a busy CTA times how many of them an SM holds, on the average where the
    grid does not fill the device."""
    per_sm = statistics.busy_ctas / LIMITS[compiled.arch].sms
    return round(statistics.bytes_in_flight * min(compiled.report().occupancy, per_sm))


def problems(case: Case, arch: int, row: Row) -> list[str]:
    """The bars that a row misses, in words."""
    found = []
    for launch in row["launches"]:
        name = f"{case.name}, sm_{arch}, {launch['kernel']}"
        if launch["spills"] and arch in WITHOUT_SPILLS:
            found.append(f"{name}: {launch['spills']} spills")
        if not launch["occupancy"]:
            found.append(f"{name}: does not fit on an SM")
        for argument, widths in launch["wide"].items():
            narrow = {bits: count for bits, count in widths.items() if int(bits) < WIDE}
            if narrow:
                found.append(f"{name}: loads of {argument} narrower than {WIDE} bits: {narrow}")
        if launch["wide"] and launch.get("in_flight_per_sm", case.least_in_flight) < case.least_in_flight:
            found.append(f"{name}: {launch['in_flight_per_sm']} bytes in flight per SM, not {case.least_in_flight}")
    if row.get("ratio", 0) > case.most_bytes:
        found.append(f"{case.name}, sm_{arch}: moves {row['ratio']} of the least bytes, more than {case.most_bytes}")
    return found


def missed_bars(chosen: Iterable[Case], rows: Rows) -> list[str]:
    """``problems`` of all rows."""
    return [
        problem
        for case in chosen
        for arch, row in rows[case.name].items()
        for problem in problems(case, int(arch.removeprefix("sm_")), row)
    ]


def build(chosen: Iterable[Case], *, count: bool, archs: Sequence[int] | None = None) -> Rows:
    """The rows of cases, by the Triton of this process."""
    return {
        case.name: {
            f"sm_{arch}": measure(case, arch, count=count and arch in COUNTED)
            for arch in case.architectures
            if archs is None or arch in archs
        }
        for case in chosen
    }


def differences(stored: Mapping[str, Mapping[str, Row]], found: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """What changed, one line per value: ``case, sm_90, kernel: registers 96 -> 104``."""
    lines = []
    for case in sorted(set(stored) | set(found)):
        if case not in found or case not in stored:
            lines.append(f"{case}: {'not stored' if case in found else 'gone'}")
            continue
        for arch in sorted(set(stored[case]) | set(found[case])):
            _compare(f"{case}, {arch}", stored[case].get(arch, {}), found[case].get(arch, {}), lines)
    return lines


def _compare(place: str, before: Any, after: Any, lines: list[str]) -> None:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted(set(before) | set(after)):
            _compare(f"{place}: {key}" if key != "launches" else place, before.get(key), after.get(key), lines)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for one, other in zip(before, after, strict=True):
            _compare(f"{place}, {other.get('kernel')}", one, other, lines)
    elif before != after:
        lines.append(f"{place} {json.dumps(before)} -> {json.dumps(after)}")


def _texts(counts: Mapping[int, int]) -> dict[str, int]:
    """JSON has string keys only; a row must equal what is read back."""
    return {str(key): value for key, value in sorted(counts.items(), reverse=True)}


# ---------------------------------------------------------------------- another Triton


def other_triton(version: str) -> Path:
    """A folder that holds Triton ``version`` alone, to stand first on PYTHONPATH; installed on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"
    folder = cache / f"triton-{version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:  # renamed when whole: never half an installation
            target = Path(partial) / "whole"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
            subprocess.run([*command, f"triton=={version}"], check=True)
            target.rename(folder)
    return folder


def build_with(version: str, names: Sequence[str] = ()) -> Rows:
    """The rows of all cases (or of those ``names``), compiled by another Triton in a process of its own."""
    path = os.pathsep.join(filter(None, [str(other_triton(version)), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "headrace.kernels.lab.table", "--rows"]
    for name in names:
        command += ["--case", name]
    output = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if output.returncode:
        raise RuntimeError(f"the table with Triton {version}:\n{output.stderr}")
    answer = json.loads(output.stdout.splitlines()[-1])
    if answer["triton"] != version:
        raise RuntimeError(f"asked for Triton {version}, got {answer['triton']}")
    rows: Rows = answer["rows"]
    return rows


# ---------------------------------------------------------------------- file and command line


def read(path: Path = TABLE) -> dict[str, Rows]:
    """Triton version -> rows."""
    if not path.exists():
        return {}
    stored: dict[str, Rows] = json.loads(path.read_text())
    return stored


def write(table: Mapping[str, Rows], path: Path = TABLE) -> None:
    """One line per launch, so that a diff of the file reads like ``differences``."""
    lines = ["{"]
    for version, rows in sorted(table.items()):
        lines.append(f" {json.dumps(version)}: {{")
        for case, archs in sorted(rows.items()):
            lines.append(f"  {json.dumps(case)}: {{")
            for arch, row in archs.items():
                rest = "".join(f", {json.dumps(key)}: {value}" for key, value in row.items() if key != "launches")
                launches = ",\n    ".join(json.dumps(launch) for launch in row["launches"])
                lines.append(f'   {json.dumps(arch)}: {{"launches": [\n    {launches}]{rest}}},')
            lines[-1] = lines[-1].removesuffix(",")
            lines.append("  },")
        lines[-1] = lines[-1].removesuffix(",")
        lines.append(" },")
    lines[-1] = lines[-1].removesuffix(",")
    path.write_text("\n".join([*lines, "}"]) + "\n")


def select(patterns: Sequence[str]) -> list[Case]:
    """Cases whose name contains one of ``patterns``; all of them without any."""
    found = registry.collect()
    return [case for name, case in found.items() if not patterns or any(pattern in name for pattern in patterns)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.kernels.lab.table", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write table.json")
    parser.add_argument("--case", action="append", default=[], help="only cases with this in their name")
    parser.add_argument("--rows", action="store_true", help="print the rows as JSON, compiled only")
    options = parser.parse_args(arguments)
    chosen = select(options.case)
    if options.rows:
        print(json.dumps({"triton": triton.__version__, "rows": build(chosen, count=False)}))
        return 0
    names = [case.name for case in chosen]
    with ThreadPoolExecutor(1) as background:
        oldest = background.submit(build_with, OLDEST, names if options.case else ())
        found = {NEWEST: build(chosen, count=True), OLDEST: oldest.result()}
    stored, failed = read(), []
    for version, rows in found.items():
        missed = [f"triton {version}: {line}" for line in missed_bars(chosen, rows)]
        print(*missed, sep="\n", end="\n" if missed else "")
        failed += missed
    for version, rows in found.items():
        before = {name: row for name, row in stored.get(version, {}).items() if not options.case or name in names}
        print("\n".join(f"triton {version}: {line}" for line in differences(before, rows)) or f"triton {version}: same")
        failed += [] if options.update or before == rows else [f"triton {version}: differs from {TABLE.name}"]
        if options.update:
            kept = {} if not options.case else stored.get(version, {})
            stored[version] = {**kept, **rows}
    if options.update:
        write(stored)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
