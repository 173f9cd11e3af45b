"""Where a C++ compiler is at hand the package must have been installed with its native kernels."""

import shutil

import pytest

from headrace.kernels import native_is_built


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler on this machine")
def test_the_native_kernels_were_built() -> None:
    assert native_is_built(), "installed without the native kernels although there is a compiler: look at pip's output"
