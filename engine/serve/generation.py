"""The paths that generate: ``/v1/chat/completions`` and ``/v1/completions``, streaming or not."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from headrace.engine import Delta, Finished, SamplingParams
from headrace.engine.serve.bodies import Answer, Chunks, Envelope, Form, check_finished
from headrace.engine.serve.chat_form import ChatForm
from headrace.engine.serve.errors import from_engine
from headrace.engine.serve.history import Record
from headrace.engine.serve.metrics import Watch
from headrace.engine.serve.profiles import EVENTS
from headrace.engine.serve.prompts import CompletionCall, parse_completion
from headrace.engine.serve.protocol import ChatCall, parse_chat
from headrace.engine.serve.service import Service, read_body
from headrace.engine.serve.stream import HEADERS, Events, Streams, abort_on_disconnect, events_of
from headrace.engine.serve.text_form import TextForm
from headrace.tokenizer import template_options

if TYPE_CHECKING:
    from headrace.engine import Engine


@dataclass(frozen=True, slots=True)
class Job:
    """A request that the engine has taken. ``prompts`` are the prompts' ids if the client wants to see token ids."""

    events: Events
    call: ChatCall | CompletionCall
    prompts: Sequence[Sequence[int]]
    num_prompts: int
    budget: int | None  # of reasoning tokens; None where nothing is reasoned

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.call.params

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
        service.admit()  # before the body: nobody should send a long one for nothing
        body = await read_body(request, service.max_body_bytes)
        engine = service.admit_generation()
        with service.request():
            # A long prompt must not hold up the streams: parsing, rendering and encoding go to a worker thread.
            job = await to_thread.run_sync(
                self._submit, engine, body, request.headers.get("accept"), limiter=service.encoders
            )
            record.stream, record.choices = job.call.stream, job.choices
            watch = Watch(record, service.metrics, job.budget, job.params.n, job.num_prompts)
            with service.hold(job.events), watch:
                async with abort_on_disconnect(receive, job.events, record):
                    await self._answer(engine, job, followed(job.events, watch), scope, receive, send)

    def _submit(self, engine: Engine, body: bytes, accept: str | None) -> Job:
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
        if not job.call.stream:
            answer = Answer(envelope, form, job.choices)
            async for event in events:
                answer.add(event)
            await JSONResponse(answer.body())(scope, receive, send)
            return
        first = await anext(events)
        if isinstance(first, Finished):
            check_finished(first)
        headers = [(name.encode(), value.encode()) for name, value in (HEADERS | {"content-type": EVENTS}).items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in events_of(Chunks(envelope, form), first, events, record):
            await send({"type": "http.response.body", "body": data, "more_body": True})
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
            token_ids=job.call.return_token_ids,
            include_usage=job.call.include_usage,
        )


class ChatCompletions(Generation):
    """``POST /v1/chat/completions``."""

    id_prefix = "chatcmpl-"

    def submit(self, engine: Engine, body: bytes, accept: str | None) -> Job:
        """See Generation."""
        call = parse_chat(body, accept, self.service.profile, self.service.name_of(engine))
        options, params = call.options, call.params
        prompts = [engine.prompt_ids(call.messages, options).ids] if call.return_token_ids else []
        thinking = template_options(options.reasoning_effort, options.chat_template_kwargs)["enable_thinking"]
        budget = params.reasoning_budget if options.budget is None else options.budget
        stream = engine.chat_stream(call.messages, params, options)
        return Job(stream, call, prompts, 1, budget if thinking else None)

    def form(self, envelope: Envelope) -> Form:
        """See Generation."""
        return ChatForm(envelope)


class Completions(Generation):
    """``POST /v1/completions``: raw prompts."""

    id_prefix = "cmpl-"

    def submit(self, engine: Engine, body: bytes, accept: str | None) -> Job:
        """See Generation. All prompts are taken, or none."""
        call = parse_completion(body, accept, self.service.profile, self.service.name_of(engine), engine)
        streams = []
        try:
            for prompt in call.prompts:
                streams.append(engine.generate_stream(prompt, call.params))
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        prompts = call.prompts if call.return_token_ids else []
        return Job(Streams(streams, call.params.n), call, prompts, len(streams), None)

    def form(self, envelope: Envelope) -> Form:
        """See Generation."""
        return TextForm(envelope)


async def followed(events: Events, watch: Watch) -> AsyncIterator[Delta | Finished]:
    """The events, each seen by the watch as it passes."""
    async for event in events:
        watch.see(event)
        yield event
