"""``headrace serve``: the HTTP server."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.engine.cli import options
from headrace.engine.cli.common import UserError, engine_config, load_engine
from headrace.engine.cli.startup import loading_plan, serving_plan

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from headrace.engine import Engine, EngineConfig
    from headrace.engine.serve.run import DrainingServer

KEY_VARIABLE = "HEADRACE_API_KEY"


def serve(
    model: options.Model = None,
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    threads: options.Threads = None,
    instructions: options.Instructions = "auto",
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
    stall_seconds: Annotated[
        float, typer.Option(help="A step that takes longer fails /health/live: only a restart would help.", min=1)
    ] = 300.0,
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        typer.Option(help="What to log, on stderr; info has a line for every request."),
    ] = "warning",
    max_sequences: options.MaxSequences = None,
    max_waiting: options.MaxWaiting = None,
    max_context: options.MaxContext = None,
    kv_dtype: options.KvDtype = "auto",
) -> None:
    """Serve the model over HTTP, for any OpenAI client. What it sets aside is said on stderr before it serves.

    SIGTERM or Ctrl-C: new requests get 503, running answers finish, then the server ends. A second one ends at once.
    If the engine fails for good, the server says so for a few seconds and ends with status 1.
    """
    # Read once, when torch loads OpenMP: its threads, idle between two ops, are not to spin beside the event loop.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from headrace.engine.serve.profiles import PROFILES
    from headrace.engine.serve.run import DrainingServer, url_of

    config = engine_config(
        device=device, backend=backend, threads=threads, instructions=instructions, max_sequences=max_sequences,
        max_waiting=max_waiting, max_context=max_context, kv_dtype=kv_dtype,
    )  # fmt: skip
    listener, app = _front(
        host, port, api_key_file,
        profile=PROFILES[profile], served_name=served_model_name, stall_seconds=stall_seconds,
    )  # fmt: skip
    server = DrainingServer(app, drain_seconds=drain_seconds, log_level=log_level)
    loading = Loading(server, model, config, url_of(listener), profile)
    _serve(server, loading, listener)


def _serve(server: DrainingServer, loading: Loading, listener: socket.socket) -> None:
    """Until it is told to end. Raises what loading raised, and Exit with status 1 if the engine failed for good."""
    loading.start()
    try:
        server.run(sockets=[listener])
    except BaseException:
        loading.close(status=1)
        raise
    loading.close()
    if loading.error is not None:
        raise loading.error
    if server.service.fault is not None:  # whoever watches the process starts it anew
        print(f"headrace: {server.service.fault}", file=sys.stderr)
        raise typer.Exit(1)


class Loading(threading.Thread):
    """Loads the engine beside the server, and ends the server if that fails."""

    def __init__(
        self, server: DrainingServer, model: str | None, config: EngineConfig, where: str, profile: str
    ) -> None:
        super().__init__(name="headrace-load", daemon=True)
        self._server = server
        self._model = model
        self._config = config
        self._where, self._profile = where, profile
        self._engine: Engine | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Thread body."""
        try:
            self._engine = self._load()
        except BaseException as error:
            self.error = error
            self._server.should_exit = True
            return
        gc.collect()
        gc.freeze()  # what has been loaded stays: collections need not look at it again and again
        self._server.service.attach(self._engine)
        self._server.up.wait()
        name = self._server.service.name_of(self._engine)
        tell([f"console  {self._where}/", f"serving {name} at {self._where}/v1 (profile {self._profile})"])

    def _load(self) -> Engine:
        try:
            tell(loading_plan(self._model, self._config))
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
        engine = load_engine(self._model, self._config)
        tell(serving_plan(engine))
        return engine

    def close(self, status: int = 0) -> None:
        """Close the engine. If it is still being loaded the process ends here, with this status."""
        if self.is_alive():
            # Libraries that are being imported or reading files do not survive the interpreter's orderly end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        if self._engine is not None:
            self._engine.close()


def tell(lines: list[str]) -> None:
    """Say what the server is about to do, or does, to whoever started it."""
    for line in lines:
        print(f"headrace: {line}", file=sys.stderr, flush=True)


def _front(host: str, port: int, key_file: Path | None, **options: Any) -> tuple[socket.socket, Starlette]:
    """The open port and the application, which has digests of the keys. The keys themselves end here.

    The port is open while the model loads: health checks see 503 with Retry-After instead of nothing.
    """
    from headrace.engine.serve.app import create_app

    keys = _keys(key_file)
    return _listener(host, port, keys), create_app(None, keys=keys, **options)


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
