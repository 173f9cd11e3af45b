"""The ``headrace`` command with a scripted engine, for tests that need a process of their own."""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from scripted_engine import HOLD, ScriptedEngine, delta, finished

from headrace.engine.cli import common, main, serve
from headrace.engine.run.memory import CacheSizes
from headrace.engine.serve import run


def script(prompt):
    """Counts the messages it gets; a question that holds "wait" gets half an answer and then nothing."""
    begun = [delta("reasoning", "Hm."), delta("content", f"{len(prompt)} messages")]
    return (
        [*begun, HOLD, finished()] if "wait" in prompt[-1]["content"] else [*begun, delta("content", "!"), finished()]
    )


def load_engine(model, config=None):
    if model == "slow":
        os.write(2, b"loading\n")
        threading.Event().wait()
    engine = ScriptedEngine(script)
    engine.sizes = CacheSizes(64, 100, 16, engine.max_context, page_bytes=1 << 20, slot_bytes=1 << 10)
    if model == "failing":
        engine.fault = "the device is lost"
    return engine


run.FAULT_SECONDS = 0.5
serve.loading_plan = lambda model, config: []  # there are no files to look at
common.load_engine = serve.load_engine = load_engine
sys.exit(main(sys.argv[1:]))
