"""The command line: ``headrace chat | generate | serve | inspect | plan | quantize | bench``.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from headrace.engine.cli import bench, chat, generate, inspect, plan, quantize, serve
from headrace.engine.cli.common import UserError

INTERRUPTED = 130
USER_ERROR = 2

app = typer.Typer(
    name="headrace",
    help="A decoding engine for Nemotron-3-class models. Without --model it runs the small model it comes with.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (chat.chat, generate.generate, serve.serve, inspect.inspect, plan.plan, quantize.quantize, bench.bench):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"headrace {version('headrace')}")
        except PackageNotFoundError:
            print("headrace (running from the sources)")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What a user did wrong is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    try:
        status = app(args=argv, prog_name="headrace", standalone_mode=False)
    except (typer.TyperException, UserError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message := " ".join(message.replace("Value error, ", "").split()):  # none: the help has been printed
            print(f"headrace: {message}", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left, as `head` does. Python flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0
