"""Makes the scripted engine beside the server's tests importable, for the command line's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
