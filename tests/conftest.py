"""For all tests: one torch thread, and an early start for what runs in processes of its own."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import hypothesis
import pytest
import torch

# Clocks decide nothing: a busy machine must not fail a property. And the same examples every time, so that a red run
# is red again; --hypothesis-profile=explore looks for new ones.
UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same", derandomize=True, database=None, **UNTIMED)
hypothesis.settings.register_profile("explore", max_examples=1000, **UNTIMED)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Waiting threads of a parallel region spin; beside other work two of them are slower than one.

    Tests that are about threads set their own number.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def early(request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[Any]"]]:
    """Results of tests marked ``early(job=function)``, by node id: function(**parameters), begun with the session.

    Such a function waits for a process of its own. One at a time they use the core that pytest leaves idle.
    """
    pool = ThreadPoolExecutor(1)
    jobs = {}
    for item in request.session.items:
        if marker := item.get_closest_marker("early"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            jobs[item.nodeid] = pool.submit(marker.kwargs["job"], **parameters)
    yield jobs
    pool.shutdown(wait=False, cancel_futures=True)
