"""The checked-in table against what the kernels compile to now, and the bars the kernels must reach.

After a wanted change: ``python -m headrace.kernels.lab.table --update``, and look at the diff.
"""

import pytest

pytest.importorskip("triton")

import triton

from headrace.kernels.lab import table
from headrace.kernels.lab.cases import collect

CASES = collect()
STORED = table.read()


def test_every_case_is_stored():
    assert triton.__version__ == table.NEWEST, "the table is of another Triton"
    for version in (table.NEWEST, table.OLDEST):
        assert sorted(STORED[version]) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_newest_triton(name):
    found = table.build([CASES[name]], count=True)
    changed = table.differences({name: STORED[table.NEWEST].get(name, {})}, found)
    assert not changed, "\n".join(changed)
    missed = table.missed_bars([CASES[name]], found)
    assert not missed, "\n".join(missed)


def build_oldest() -> table.Rows:
    """All cases, compiled by the oldest Triton in a process of its own."""
    return table.build_with(table.OLDEST)


@pytest.mark.timeout(1200)
@pytest.mark.early(job=build_oldest)
def test_oldest_triton(early, request):
    found = early[request.node.nodeid].result()
    changed = table.differences(STORED[table.OLDEST], found)
    assert not changed, "\n".join(changed)
    missed = table.missed_bars(CASES.values(), found)
    assert not missed, "\n".join(missed)
