"""``headrace serve``: the HTTP server."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.engine.cli import options
from headrace.engine.cli.common import UserError, engine_config, load_engine

if TYPE_CHECKING:
    from headrace.engine import Engine, EngineConfig
    from headrace.engine.serve.run import DrainingServer

KEY_VARIABLE = "HEADRACE_API_KEY"
ENGINE = "Engine"


def serve(
    model: options.Model = None,
    device: options.Device = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on; without keys only a loopback one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    profile: Annotated[
        Literal["nim", "openai"],
        typer.Option(help="nim: the published parameters. openai: what OpenAI clients expect."),
    ] = "nim",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"API keys, one a line; {KEY_VARIABLE} holds one more.", show_default="no keys"),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model for clients.", show_default="the checkpoint's")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="How long running answers may go on after SIGTERM.", min=0)
    ] = 60.0,
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        typer.Option(help="What to log, on stderr; info has a line for every request."),
    ] = "warning",
    max_sequences: Annotated[
        int | None, typer.Option(help="Answers generated together.", show_default="64", rich_help_panel=ENGINE)
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Answers that may queue.", show_default="1024", rich_help_panel=ENGINE)
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(help="Tokens per conversation.", show_default="the model's limit", rich_help_panel=ENGINE),
    ] = None,
) -> None:
    """Serve the model over HTTP, for any OpenAI client.

    SIGTERM or Ctrl-C: new requests get 503, running answers finish, then the server ends. A second one ends at once.
    If the engine fails for good, the server says so for a few seconds and ends with status 1.
    """
    from headrace.engine.serve.app import create_app
    from headrace.engine.serve.profiles import PROFILES
    from headrace.engine.serve.run import DrainingServer, url_of

    config = engine_config(device=device, max_sequences=max_sequences, max_waiting=max_waiting, max_context=max_context)
    keys = _keys(api_key_file)
    listener = _listener(host, port, keys)
    # The port is open while the model loads: health checks see 503 with Retry-After instead of nothing.
    app = create_app(None, profile=PROFILES[profile], keys=keys, served_name=served_model_name)
    server = DrainingServer(app, drain_seconds=drain_seconds, log_level=log_level)
    loading = Loading(server, model, config, f"{url_of(listener)}/v1 (profile {profile})")
    loading.start()
    try:
        server.run(sockets=[listener])
    finally:
        loading.close()
    if loading.error is not None:
        raise loading.error
    if server.service.fault is not None:  # whoever watches the process starts it anew
        print(f"headrace: {server.service.fault}", file=sys.stderr)
        raise typer.Exit(1)


class Loading(threading.Thread):
    """Loads the engine beside the server, and ends the server if that fails."""

    def __init__(self, server: DrainingServer, model: str | None, config: EngineConfig, where: str) -> None:
        super().__init__(name="headrace-load", daemon=True)
        self._server = server
        self._model = model
        self._config = config
        self._where = where
        self._engine: Engine | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Thread body."""
        try:
            self._engine = load_engine(self._model, self._config)
        except BaseException as error:
            self.error = error
            self._server.should_exit = True
            return
        self._server.service.attach(self._engine)
        self._server.up.wait()
        print(
            f"headrace: serving {self._server.service.name_of(self._engine)} at {self._where}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Close the engine. If it is still being loaded the process ends here, with status 0."""
        if self.is_alive():
            # Libraries that are being imported or reading files do not survive the interpreter's orderly end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if self._engine is not None:
            self._engine.close()


def _listener(host: str, port: int, keys: list[str]) -> socket.socket:
    from headrace.engine.serve.access import check_host
    from headrace.engine.serve.run import allow_connections, listen

    allow_connections()
    try:
        check_host(host, keys)
        return listen(host, port)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _keys(path: Path | None) -> list[str]:
    from headrace.engine.serve.access import read_keys

    try:
        keys = [] if path is None else read_keys(path)
    except (OSError, ValueError) as error:
        raise UserError(f"api key file: {error}") from error
    return keys + [key for key in [os.environ.get(KEY_VARIABLE, "").strip()] if key]
