"""What the README shows is so: its commands, its links, its Python."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_two_fenced_lines_are_the_two_commands():
    first, second = [line for _, text in FENCES for line in text.splitlines()][:2]
    assert "headrace generate" in first
    assert "pytest" in second
    assert all(line.startswith("python3 -m venv .venv && ") for line in (first, second))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "engine/tiny/README.md"])
def test_links_resolve_and_no_placeholder_is_left(document):
    path = ROOT / document
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    assert not re.search(r"\b[A-Z]+_TABLE\b|TODO|TBD", text)


def test_files_named_as_evidence_exist():
    named = re.findall(r"`((?:tests|benchmarks|engine|kernels)/[\w/.*-]+)`", README)
    assert len(named) > 5
    for name in named:
        assert list(ROOT.glob(name)), name


def test_the_python_example_runs(capsys):
    """The first Python fence as it stands; the second needs a server and is tests/serve/test_openai_client.py."""
    code = next(text for language, text in FENCES if language == "python" and "headrace.engine" in text)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "408" in printed  # 12 x 34
    assert "Finished(" in printed
