"""Makes the helper modules beside the tests importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from networks import text_folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with the tokenizer and template that the engine tests use."""
    return text_folder(tmp_path_factory.mktemp("engine"))
