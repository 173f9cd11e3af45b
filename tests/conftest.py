"""For all tests: one torch thread (tests that are about threads set their own), so that a busy machine stays usable."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Waiting threads of a parallel region spin; beside other work two of them are slower than one."""
    torch.set_num_threads(1)
