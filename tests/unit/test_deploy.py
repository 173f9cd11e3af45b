"""What ``deploy/`` shows is so: options, paths and metrics are those of the server that it is written for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from live_server import LiveServer, live
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine

from headrace.engine.cli import app
from headrace.engine.cli.serve import serve
from headrace.engine.serve.access import PUBLIC_PATHS
from headrace.engine.serve.connection import MAX_CONNECTIONS
from headrace.engine.serve.run import ABORT_GRACE_SECONDS, EXIT_SECONDS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CONTAINER = (DEPLOY / "Containerfile").read_text()
UNIT = (DEPLOY / "headrace.service").read_text()
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
README = (DEPLOY / "README.md").read_text()


def serve_options() -> set[str]:
    """Every option of ``headrace serve``."""
    command: Any = typer.main.get_command(app)
    return {option for parameter in command.commands["serve"].params for option in parameter.opts}


def options_in(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


# --- the dashboard --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scraped() -> Iterator[LiveServer]:
    with live(ScriptedEngine()) as server:
        assert server.chat().status_code == 200
        yield server


def names_of(expression: str) -> set[str]:
    """Metrics of a PromQL expression: what stands before a selector or a range, or alone; not functions, not labels."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|without)\s*\([^)]*\)', " ", expression)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - {"by", "without"}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_names_are_found_in_expressions() -> None:
    found = names_of('histogram_quantile(0.9, sum by (le) (rate(headrace:a_bucket{model_name=~"$m"}[5m]))) / process_x')
    assert found == {"headrace:a_bucket", "process_x"}


def test_every_metric_of_the_dashboard_is_served(scraped: LiveServer) -> None:
    families = text_string_to_metric_families(scraped.client.get("/metrics").text)
    served: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            served.setdefault(sample.name, set()).update(sample.labels)
    asked = {name for expression in expressions() for name in names_of(expression)}
    assert len(asked) > 25
    assert not asked - served.keys()
    for expression in expressions():  # and it has the labels that are asked for; "job" and "instance" are Prometheus's
        for name, selector in re.findall(r"([\w:]+)\{([^}]*)\}", expression):
            wanted = set(re.findall(r"(\w+)\s*=~", selector)) - {"job"}
            assert wanted <= served[name], expression
        for label in re.findall(r"by \((\w+)\)", expression):
            assert any(label in served[name] for name in names_of(expression)), expression


def test_most_of_what_is_served_is_on_the_dashboard(scraped: LiveServer) -> None:
    """A metric that nobody looks at is forgotten."""
    shown = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for e in expressions()
             for name in names_of(e)}  # fmt: skip
    families = text_string_to_metric_families(scraped.client.get("/metrics").text)
    ours = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if family.name.startswith("headrace:") and not family.name.endswith("_created")
    }
    assert len(ours) > 20
    assert not ours - shown


def test_the_dashboard_is_one() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables
    assert "id" not in DASHBOARD  # Grafana gives one


# --- the unit -------------------------------------------------------------------------------------------------------


def settings(section: str) -> dict[str, list[str]]:
    """A section's settings; one that stands twice has two values."""
    text = UNIT.split(f"[{section}]")[1].split("\n[")[0]
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_what_there_is() -> None:
    [start] = settings("Service")["ExecStart"]
    program, command, *words = shlex.split(start)
    assert Path(program).name == "headrace"
    assert command == serve.__name__
    assert options_in(words) <= serve_options()
    [credential] = settings("Service")["LoadCredential"]
    assert f"${{CREDENTIALS_DIRECTORY}}/{credential.split(':')[0]}" in words


def test_the_unit_waits_for_a_drain_and_has_the_files() -> None:
    service = settings("Service")
    words = shlex.split(service["ExecStart"][0])
    drain = int(words[words.index("--drain-seconds") + 1])
    longest = drain + ABORT_GRACE_SECONDS + EXIT_SECONDS
    assert int(service["TimeoutStopSec"][0]) > longest
    stop = re.search(r"--stop-timeout (\d+)", README)
    assert stop and int(stop[1]) > longest
    assert int(service["LimitNOFILE"][0]) > MAX_CONNECTIONS
    assert service["Restart"] == ["on-failure"]
    assert service["RestartPreventExitStatus"] == ["2"]  # what a user did wrong stays wrong


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Every setting is known and well-formed, and what it leaves open is little by systemd's own count."""
    program = tmp_path / "headrace"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "headrace.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={program}", UNIT, flags=re.MULTILINE))
    found = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    mine = [line for line in (found.stdout + found.stderr).splitlines() if "headrace" in line]
    assert not mine, found.stderr
    security = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", unit]
    counted = subprocess.run(security, capture_output=True, text=True, check=False)
    if "unrecognized option" in counted.stderr:
        pytest.skip("this systemd does not count offline")
    assert counted.returncode == 0, counted.stdout + counted.stderr


# --- the image ------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", CONTAINER, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def test_the_image_has_two_stages_and_no_root() -> None:
    stages = [rest for name, rest in instructions() if name == "FROM"]
    assert len(stages) == 2
    assert not re.search(r"[\w-]+\.[\w.-]+/", " ".join(stages)), "a registry's host"
    order = [name for name, _ in instructions()]
    assert order.index("USER") > len(order) - 1 - order[::-1].index("COPY")
    user = last("USER").split(":")[0]
    assert user.isdigit() and int(user) > 0
    assert last("STOPSIGNAL") == "SIGTERM"


def test_the_image_starts_what_there_is() -> None:
    program, command = json.loads(last("ENTRYPOINT"))
    words = json.loads(last("CMD"))
    assert (program, command) == ("headrace", serve.__name__)
    assert options_in(words) <= serve_options()
    assert "--api-key-file" in words  # or it would not start on that host
    assert last("EXPOSE") == words[words.index("--port") + 1]


def test_the_image_copies_what_the_build_needs() -> None:
    root = DEPLOY.parent
    copied = [
        word for name, rest in instructions() if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ]
    assert all((root / name).exists() for name in copied)
    assert {"engine", "kernels", "tokenizer", "pyproject.toml", "CMakeLists.txt"} <= {*copied}


def test_the_health_check_passes_on_a_ready_server_and_on_no_other(scraped: LiveServer) -> None:
    check = last("HEALTHCHECK").partition("CMD ")[2]
    path = re.search(r"http://127\.0\.0\.1:8000(/[\w/]+)", check)
    assert path and path[1] in PUBLIC_PATHS
    argv = json.loads(check.replace("127.0.0.1:8000", f"127.0.0.1:{scraped.port}"))
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    service: Any = scraped.service
    service.draining = True
    try:
        assert subprocess.run(argv, capture_output=True, check=False).returncode != 0
    finally:
        service.draining = False


# --- the words ------------------------------------------------------------------------------------------------------


def test_the_readme_names_what_there_is() -> None:
    for name in re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE):
        assert (DEPLOY / name).is_file()
    assert options_in(re.findall(r"--[a-z-]+", README)) & serve_options()
    for path in re.findall(r"`GET (/[\w/]+)`", README):
        assert path in PUBLIC_PATHS | {"/metrics"}
