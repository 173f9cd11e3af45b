"""Makes the helpers beside the tests importable, and the scripted engine of the server's, for the command line's."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "serve"), str(Path(__file__).parent)]
