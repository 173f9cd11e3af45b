"""The paths that generate: ``/v1/chat/completions`` and ``/v1/completions``, streaming or not."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.engine import Delta, Finished, SamplingParams
from headrace.engine.serve.bodies import Answer, Chunks, Envelope, Form, check_finished
from headrace.engine.serve.chat_form import ChatForm
from headrace.engine.serve.connection import SEND_CHUNK
from headrace.engine.serve.errors import from_engine, unavailable
from headrace.engine.serve.history import Record
from headrace.engine.serve.metrics import Watch
from headrace.engine.serve.profiles import EVENTS, JSON
from headrace.engine.serve.prompts import parse_completion
from headrace.engine.serve.protocol import parse_chat
from headrace.engine.serve.service import Service
from headrace.engine.serve.stream import HEADERS, Client, Events, Streams, events_of
from headrace.engine.serve.text_form import TextForm
from headrace.tokenizer import template_options

if TYPE_CHECKING:
    from headrace.engine import Engine


@dataclass(frozen=True, slots=True)
class Job:
    """A request that the engine has taken, and what its answer needs to know of it. Its text is not kept."""

    events: Events
    params: SamplingParams
    stream: bool
    include_usage: bool
    token_ids: bool
    prompts: Sequence[Sequence[int]]  # the prompts' ids where token ids are to be shown
    num_prompts: int
    budget: int | None  # of reasoning tokens; None where nothing is reasoned

    @property
    def choices(self) -> int:
        """Choices of the whole answer."""
        return self.num_prompts * self.params.n


class Generation(ABC):
    """An ASGI endpoint that answers with what the engine generates."""

    id_prefix: str

    def __init__(self, service: Service) -> None:
        self.service = service

    @abstractmethod
    def submit(self, engine: Engine, body: bytes, accept: str | None) -> Job:
        """Parse a body and hand the request to the engine. Runs in a worker thread."""

    @abstractmethod
    def form(self, envelope: Envelope) -> Form:
        """How the answer is written."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. A client that goes away, streaming or not, frees what it held within a step."""
        service, request = self.service, Request(scope, receive)
        record: Record = scope["state"]["record"]
        record.generates = True
        service.admit_generation()  # before the body: nobody should send a long one for nothing
        client = Client(receive, record)
        try:
            engine, job = await self._taken(request, client)
            record.stream, record.choices = job.stream, job.choices
            watch = Watch(record, service.metrics, job.budget, job.params.n, job.num_prompts)
            with service.hold(job.events), watch:
                client.waits_for(job.events)
                await self._answer(engine, job, followed(job.events, watch), scope, receive, send)
        finally:
            client.close()

    async def _taken(self, request: Request, client: Client) -> tuple[Engine, Job]:
        """Read the body and hand the request to the engine. The body is gone when this returns."""
        service, accept = self.service, request.headers.get("accept")
        async with service.bodies.read(request) as body:
            client.watch()
            engine = service.admit_generation()
            with service.encoding():
                # A long prompt must not hold up the streams: parsing, rendering and encoding go to a worker thread.
                submit = partial(self._submit, engine, client, body, accept)
                return engine, await to_thread.run_sync(submit, limiter=service.encoders(len(body)))

    def _submit(self, engine: Engine, client: Client, body: bytes, accept: str | None) -> Job:
        if client.gone:
            raise ClientDisconnect
        if self.service.ended:
            raise unavailable("the server is shutting down", "draining")
        try:
            return self.submit(engine, body, accept)
        except Exception as error:
            refusal = from_engine(error, self.service.retry_after())
            if refusal is None:
                raise
            raise refusal from None

    async def _answer(
        self,
        engine: Engine,
        job: Job,
        events: AsyncIterator[Delta | Finished],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The answer's first byte waits for the first event, so that what fails before it is an HTTP error."""
        record: Record = scope["state"]["record"]
        envelope = self._envelope(engine, job, record)
        form = self.form(envelope)
        if not job.stream:
            answer = Answer(envelope, form, job.choices)
            async for event in events:
                answer.add(event)
            body = await to_thread.run_sync(answer.dumped, limiter=self.service.writers)
            await Response(body, media_type=JSON)(scope, receive, send)
            return
        first = await anext(events)
        if isinstance(first, Finished):
            check_finished(first)
        headers = [(name.encode(), value.encode()) for name, value in (HEADERS | {"content-type": EVENTS}).items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # A task of its own: a coroutine that goes on does so through all that await it, here a dozen layers of routing
        # and middleware, at every event.
        send_chunk = scope.get("extensions", {}).get(SEND_CHUNK) or partial(_send_body, send)
        await asyncio.create_task(_send_all(events_of(Chunks(envelope, form), first, events, record), send_chunk))
        await send({"type": "http.response.body", "body": b""})

    def _envelope(self, engine: Engine, job: Job, record: Record) -> Envelope:
        return Envelope(
            id=record.id.replace("req-", self.id_prefix),
            created=int(time.time()),
            model=self.service.name_of(engine),
            fingerprint=self.service.fingerprint,
            tokenizer=engine.tokenizer,
            prompts=job.prompts,
            n=job.params.n,
            logprobs=job.params.logprobs,
            token_ids=job.token_ids,
            include_usage=job.include_usage,
        )


class ChatCompletions(Generation):
    """``POST /v1/chat/completions``."""

    id_prefix = "chatcmpl-"

    def submit(self, engine: Engine, body: bytes, accept: str | None) -> Job:
        """See Generation."""
        profile, served, arguments = self.service.profile, self.service.name_of(engine), engine.template_arguments
        call = parse_chat(body, accept, profile, served, engine.max_context, arguments)
        options, params = call.options, call.params
        prompts = [engine.prompt_ids(call.messages, options).ids] if call.return_token_ids else []
        thinking = template_options(options.reasoning_effort, options.chat_template_kwargs)["enable_thinking"]
        budget = params.reasoning_budget if options.budget is None else options.budget
        stream = engine.chat_stream(call.messages, params, options)
        return Job(
            events=stream,
            params=params,
            stream=call.stream,
            include_usage=call.include_usage,
            token_ids=call.return_token_ids,
            prompts=prompts,
            num_prompts=1,
            budget=budget if thinking else None,
        )

    def form(self, envelope: Envelope) -> Form:
        """See Generation."""
        return ChatForm(envelope)


class Completions(Generation):
    """``POST /v1/completions``: raw prompts."""

    id_prefix = "cmpl-"

    def submit(self, engine: Engine, body: bytes, accept: str | None) -> Job:
        """See Generation. All prompts are taken, or none."""
        call = parse_completion(body, accept, self.service.profile, self.service.name_of(engine), engine)
        streams = engine.generate_streams(call.prompts, call.params)
        return Job(
            events=Streams(streams, call.params.n),
            params=call.params,
            stream=call.stream,
            include_usage=call.include_usage,
            token_ids=call.return_token_ids,
            prompts=call.prompts if call.return_token_ids else [],
            num_prompts=len(streams),
            budget=None,
        )

    def form(self, envelope: Envelope) -> Form:
        """See Generation."""
        return TextForm(envelope)


async def _send_all(stream: AsyncIterator[bytes], send_chunk: Callable[[bytes], Awaitable[None]]) -> None:
    async for data in stream:
        await send_chunk(data)


async def _send_body(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def followed(events: Events, watch: Watch) -> AsyncIterator[Delta | Finished]:
    """The events, each seen by the watch as it passes."""
    async for event in events:
        watch.see(event)
        yield event
