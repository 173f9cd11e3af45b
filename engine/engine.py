"""Engine: the public door. Prompts in, streams of typed events or whole completions out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from headrace.engine.config import ConfigError, ModelConfig
from headrace.engine.errors import ContextExceeded, EngineClosed, GenerationError, QueueFull, RequestError
from headrace.engine.loop import EngineLoop, Inbox, MaskState
from headrace.engine.model.batch import Caches
from headrace.engine.model.load import load_model
from headrace.engine.naming import model_name
from headrace.engine.options import EngineConfig
from headrace.engine.request import ChatOptions, Completion, SamplingParams
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes
from headrace.engine.run.runner import Model, Runner
from headrace.engine.run.warm_up import warm_up_plans
from headrace.engine.schedule import scheduler as scheduling
from headrace.engine.schedule import sequence as sequences
from headrace.engine.schedule.plan import SlotParams
from headrace.engine.sizing import cache_dtypes, cache_sizes, scheduler_limits
from headrace.engine.stream import ChoiceReader, Collector, Stream
from headrace.engine.waiting import LoopWaiter, ThreadWaiter
from headrace.kernels import Kernels, select
from headrace.kernels.control import ControlIds
from headrace.tokenizer import (
    ChatError,
    ChatTemplate,
    Rendered,
    StopMatcher,
    TextStream,
    Tokenizer,
    TokenizerError,
    has_chat_template,
    text_bytes,
)
from headrace.tokenizer import load as load_tokenizer
from headrace.tokenizer.guard import strings_in

LOG = logging.getLogger(__name__)
EMBEDDED_MODEL = Path(__file__).parent / "tiny"
EMBEDDED_NAME = "headrace-tiny"
Message = Mapping[str, Any]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a prompt is to the engine: the field it came in, and what its answer's tokens mean."""

    field: str
    thinking: bool  # it ends inside an open think block
    budget: int  # of reasoning tokens; -1: no limit
    raw: bool  # one channel, all text as it is
    content_from_reasoning: bool = False


class Engine:
    """A loaded model with its scheduler and engine thread.

    ``model`` is a checkpoint folder in the hub layout, None the embedded model. Raises what loading raises:
    CheckpointError, ConfigError and TokenizerError name the file and the key, ValueError the option.
    Use it as a context manager, or call ``close()``: no thread is left behind.

        with Engine() as engine:
            print(engine.chat([{"role": "user", "content": "12 + 34"}]).content)
    """

    def __init__(
        self, model: str | Path | None = None, config: EngineConfig | None = None, *, progress: bool = False
    ) -> None:
        path = EMBEDDED_MODEL if model is None else Path(model)
        config = config or EngineConfig()
        if not path.is_dir():
            raise ConfigError(f"{path} is not a checkpoint folder")
        model_config = ModelConfig.load(path)
        tokenizer = load_tokenizer(path)
        # Everything that config.json and the tokenizer can refuse is refused before the weights are read.
        check_control_ids(control_ids(tokenizer, config.closing_text), model_config)
        cache_sizes(model_config, config, Device(config.device))
        # A base model has no template: it generates, and refuses to chat.
        template = ChatTemplate.load(path, tokenizer) if has_chat_template(path) else None
        kernels = select_kernels(config)
        network = load_model(path, device=config.device, progress=progress, kernels=kernels)
        name = EMBEDDED_NAME if model is None else model_name(path)
        self._assemble(network, kernels, network.config, tokenizer, template, name, config)

    @classmethod
    def from_parts(
        cls,
        network: Model,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        name: str = "custom",
        config: EngineConfig | None = None,
    ) -> Engine:
        """An engine around a network of your own: anything with ``forward`` and ``logits`` (run.runner.Model)."""
        engine, config = cls.__new__(cls), config or EngineConfig()
        kernels = select_kernels(config)
        engine._assemble(network, kernels, model_config, tokenizer, template, name, config)
        return engine

    def _assemble(
        self,
        network: Model,
        kernels: Kernels,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        name: str,
        config: EngineConfig,
    ) -> None:
        self.config = config
        self._kernels = kernels
        self.model_config = model_config
        self.model_name = name
        self.tokenizer = tokenizer
        self.control = control_ids(tokenizer, config.closing_text)
        check_control_ids(self.control, model_config)
        self._template = template
        device = Device(config.device)
        self.sizes: CacheSizes = cache_sizes(model_config, config, device)
        sizes, dtypes = self.sizes, cache_dtypes(model_config, config)
        with device.work():  # what is zeroed here is zero before the first step reads it
            slots, pages = sizes.num_slots + sizes.padding, sizes.num_pages + sizes.padding
            caches = Caches.allocate(model_config, slots, pages, sizes.page_size, config.device, *dtypes)
            runner = Runner(network, kernels, caches, sizes, self.control, device)
        limits = scheduler_limits(config, sizes, model_config)
        if config.warms_up:
            runner.warm_up(warm_up_plans(limits, model_config.vocab_size))
        self._scheduler = scheduling.Scheduler(limits)
        self._loop = EngineLoop(self._scheduler, runner, config.max_waiting, model_config.vocab_size)
        self._loop_waiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaiter] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()
        # A forgotten engine stops its thread too; the loop knows nothing of the engine, so this can happen.
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion together."""
        return self.sizes.max_context

    @property
    def template_arguments(self) -> frozenset[str]:
        """What ``ChatOptions.chat_template_kwargs`` may set in this model's chat template."""
        return frozenset() if self._template is None else self._template.arguments

    # --- conversations ------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
    ) -> Completion:
        """Answer a conversation. Raises RequestError, ContextExceeded, QueueFull, GenerationError."""
        params = params or SamplingParams()
        return self._finish(self.chat_stream(messages, params, options), params)

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
    ) -> Stream:
        """Answer a conversation as a stream of Delta and, per choice, one Finished."""
        params, options = params or SamplingParams(), options or ChatOptions()
        rendered = self.prompt_ids(messages, options)
        how = Reading(
            field="messages",
            thinking=rendered.thinking,
            budget=params.reasoning_budget if options.budget is None else options.budget,
            raw=False,
            content_from_reasoning=options.force_nonempty_content,
        )
        return self._submit([rendered.ids], params, how)[0]

    def prompt_ids(self, messages: Sequence[Message], options: ChatOptions | None = None) -> Rendered:
        """The prompt a conversation becomes: ids, text, and whether it ends inside an open think block."""
        options = options or ChatOptions()
        if self._template is None:
            raise RequestError(f"{self.model_name} has no chat template: use generate()", param="messages")
        kwargs = options.chat_template_kwargs
        untruncated = kwargs.get("truncate_history_thinking") is False
        kept = untruncated and "truncate_history_thinking" in self._template.arguments
        self._check_text(text_bytes(messages, reasoning_kept=kept), "messages")
        given = sum(len(text.encode(errors="replace")) for text in strings_in(dict(kwargs)))
        self._check_text(given, "chat_template_kwargs")
        try:
            return self._template.render(
                messages, effort=options.reasoning_effort, kwargs=dict(options.chat_template_kwargs)
            )
        except ChatError as error:
            raise RequestError(str(error), param=error.param) from error
        except TokenizerError as error:
            raise RequestError(str(error), param="messages") from error

    # --- raw prompts --------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = None) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[int] | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Continue a prompt (text in which markers are markers, or ids), or any number of prompts at once.

        Everything generated is content; the budget does not act. One prompt raises what ``chat`` raises. Of many, all
        are checked before the first runs; one that fails later is a Completion with finish_reason "error".
        """
        params = params or SamplingParams()
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer))):
            return self._finish(self.generate_stream(prompt, params), params)  # type: ignore[arg-type]
        ids = [self.raw_prompt_ids(one) for one in prompt]  # type: ignore[arg-type]
        for one in ids:
            self._check_prompt(one, "prompt")
        return self._generate_many(ids, params)

    def generate_stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue one prompt as a stream."""
        return self.generate_streams([prompt], params)[0]

    def generate_streams(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Stream]:
        """Continue several prompts, each as a stream of its own. All are taken, or none."""
        return self._raw([self.raw_prompt_ids(prompt) for prompt in prompts], params or SamplingParams())

    def raw_prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a raw prompt. Raises RequestError, and ContextExceeded for text that cannot fit."""
        if isinstance(prompt, str):
            self._check_text(len(prompt.encode(errors="replace")), "prompt")
            try:
                return self.tokenizer.encode_with_markers(prompt)
            except TokenizerError as error:
                raise RequestError(str(error), param="prompt") from error
        if isinstance(prompt, (bytes, bytearray, Mapping)) or not hasattr(prompt, "__iter__"):
            raise RequestError(f"a prompt is text or token ids, got {type(prompt).__name__}", param="prompt")
        return [_token_id(token, self.model_config.vocab_size) for token in prompt]

    def _raw(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, waiter: ThreadWaiter | None = None
    ) -> list[Stream]:
        how = Reading(field="prompt", thinking=False, budget=-1, raw=True)
        return self._submit(prompts, params, how, waiter)

    def _generate_many(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """All prompts, a few more at a time than decode together; a full queue makes this wait, not fail."""
        waiter = ThreadWaiter()
        waiting = deque(enumerate(prompts))
        running: dict[int, tuple[Stream, Collector]] = {}
        done: dict[int, Completion] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.config.max_sequences:
                    index, ids = waiting[0]
                    try:
                        [stream] = self._raw([ids], params, waiter)
                    except QueueFull:
                        if not running:
                            raise
                        break
                    running[index] = stream, Collector(stream, params)
                    waiting.popleft()
                waiter.wait_until(partial(_any_ready, [stream for stream, _ in running.values()]))
                for index, (stream, collector) in list(running.items()):
                    for event in stream.poll():
                        collector.add(event)
                    if stream.done:
                        done[index] = collector.completion()
                        del running[index]
        finally:
            for stream, _ in running.values():
                stream.abort()
        return [done[index] for index in range(len(prompts))]

    # --- life ---------------------------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        """Whether the engine takes requests: not closed, not draining, its thread not failed."""
        return self._loop.accepting

    @property
    def fault(self) -> str | None:
        """Why the engine's own thread failed, if it did; it then has to be made anew."""
        return self._loop.fault

    @property
    def step_seconds(self) -> float:
        """How long the step that is under way has been running; 0 where there is none."""
        return self._loop.step_seconds

    def stats(self) -> dict[str, int]:
        """Counts of the moment: sequences, pages, slots, steps, preemptions."""
        s = self._scheduler
        return {
            "running": s.running,
            "waiting": s.waiting,
            "free_pages": s.free_pages,
            "total_pages": self.sizes.num_pages,
            "free_slots": s.free_slots,
            "total_slots": self.sizes.num_slots,
            "preemptions": s.preemptions,
            "steps": self._loop.steps,
        }

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Stop. With ``drain``, requests already accepted may finish, within ``timeout`` seconds; the rest abort.

        Raises TimeoutError if the step that is under way hangs; only the end of the process then ends it.
        """
        self._finalizer.detach()  # or the interpreter's end would wait once more for a step that hangs
        self._loop.close(drain, timeout)
        self._kernels.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------

    def _check_text(self, size: int, field: str) -> None:
        """Refuse ``size`` bytes of text that no number of tokens can hold, before any work is done on them."""
        longest = self.tokenizer.longest_token
        if longest is not None and size > longest * self.max_context:
            raise ContextExceeded(-(-size // longest), self.max_context, field, at_least=True)

    def _check_prompt(self, ids: Sequence[int], field: str) -> None:
        if not ids:
            raise RequestError("the prompt is empty", param=field)
        if len(ids) >= self.max_context:
            raise ContextExceeded(len(ids), self.max_context, field)
        if (highest := max(ids)) >= self.model_config.vocab_size:
            vocab = self.model_config.vocab_size
            raise RequestError(f"the prompt has token id {highest}; the model's vocabulary is {vocab}", param=field)

    def _submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        how: Reading,
        waiter: ThreadWaiter | None = None,
    ) -> list[Stream]:
        """A stream for each prompt; all of them are queued, or none."""
        batch: list[sequences.Sequence] = []
        masks: list[MaskState] = []
        streams = []
        stop = StopMatcher(params.stop) if params.stop else None
        for ids in prompts:
            self._check_prompt(ids, how.field)
            prompt, slot_params = np.array(ids, np.int64), self._slot_params(len(ids), params, how)
            hears, readers = waiter or ThreadWaiter(), []
            for choice in range(params.n):
                sequence = sequences.Sequence(
                    prompt,
                    replace(slot_params, choice=choice),
                    logprobs=params.logprobs or params.top_logprobs > 0,
                    top_logprobs=params.top_logprobs,
                    sink=Inbox(hears),
                )
                batch.append(sequence)
                if params.mask is not None:
                    masks.append(MaskState(params.mask, self.control, how.thinking, how.budget))
                readers.append(self._reader(sequence, how, stop))
            streams.append(Stream(readers, hears, self._loop_waiter))
        self._loop.submit(batch, masks or None)
        return streams

    def _slot_params(self, prompt_tokens: int, params: SamplingParams, how: Reading) -> SlotParams:
        return SlotParams(
            max_tokens=min(params.max_tokens, self.max_context - prompt_tokens),
            temperature=params.temperature,
            top_p=params.top_p,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            choice=0,
            thinking=how.thinking,
            budget=how.budget,
            ignore_eos=params.ignore_eos,
        )

    def _reader(self, sequence: sequences.Sequence, how: Reading, stop: StopMatcher | None) -> ChoiceReader:
        return ChoiceReader(
            sequence.params.choice,
            sequence.sink,
            TextStream(self.tokenizer, stop=stop, raw=how.raw, eos_ids=self.control.eos),
            self.tokenizer,
            self.control,
            sequence.prompt_length,
            partial(self._loop.abort, sequence),
            stop=stop,
            logprobs=sequence.logprobs,
            content_from_reasoning=how.content_from_reasoning,
        )

    def _loop_waiter(self, loop: asyncio.AbstractEventLoop) -> LoopWaiter:
        with self._lock:
            waiter = self._loop_waiters.get(loop)
            if waiter is None:
                waiter = self._loop_waiters[loop] = LoopWaiter(loop)
            return waiter

    def _finish(self, stream: Stream, params: SamplingParams) -> Completion:
        """Read one request to its end; an interrupted reader aborts it."""
        collector = Collector(stream, params)
        with stream:
            for event in stream:
                collector.add(event)
        completion = collector.completion()
        for choice in completion.choices:
            if choice.finish_reason == "error":
                raise GenerationError(choice.error)
            if choice.finish_reason == "abort":
                raise EngineClosed("the engine was closed before the request had finished")
        return completion


def _any_ready(streams: Sequence[Stream]) -> bool:
    return any(s.ready() for s in streams)


def control_ids(tokenizer: Tokenizer, closing_text: str = "") -> ControlIds:
    """The ids the budget machine and the sampler look for, by the names Nemotron 3's vocabulary gives them."""
    markers = tokenizer.markers
    end_think = markers.get("</think>", -1)
    closing = () if end_think < 0 else (*tokenizer.encode(closing_text), end_think)
    return ControlIds(
        eos=tuple(tokenizer.eos_ids),
        think=markers.get("<think>", -1),
        end_think=end_think,
        tool_call=markers.get("<tool_call>", -1),
        closing=closing,
    )


def select_kernels(config: EngineConfig) -> Kernels:
    """The kernels that a configuration asks for; says so where a CPU falls back to the references."""
    if config.kernels == "reference" and config.backend == "auto":
        LOG.warning("the native CPU kernels were not built: running the references, which are slow")
    return select(config.kernels, threads=config.threads, instructions=config.instructions)


def check_control_ids(control: ControlIds, model: ModelConfig) -> None:
    """Raises ConfigError if the tokenizer has control ids that the model has no embedding for."""
    if (highest := max(control.eos + control.closing, default=0)) >= model.vocab_size:
        raise ConfigError(f"the tokenizer's control id {highest} is outside the model's vocab_size {model.vocab_size}")


def _token_id(token: object, vocab_size: int) -> int:
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
        raise RequestError(f"prompt ids are integers from 0 to {vocab_size - 1}, got {token!r}", param="prompt")
    return int(token)
