"""Every op on a GPU beside its reference there, at an eighth of the published sizes.

``python -m benchmarks.gpu_report`` does the same at the published sizes.
"""

import pytest
import torch

from benchmarks.cases import CASES, backends
from benchmarks.compare import compare
from benchmarks.ops import EIGHTH
from headrace.kernels import select

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize("backend", [name for name in backends(CUDA) if name != "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.name}")
def test_an_op_is_right(case, backend):
    """Also in fp32, and with a row's bits the same in batches of all sizes."""
    for found in compare(select(backend), select("reference"), [case], CUDA, EIGHTH):
        assert found.word == "ok", found
