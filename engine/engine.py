"""Engine: the public door. Prompts in, streams of typed events or whole completions out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from headrace.engine.config import ConfigError, ModelConfig
from headrace.engine.errors import ContextExceeded, EngineClosed, GenerationError, QueueFull, RequestError
from headrace.engine.loop import EngineLoop, Inbox, MaskState
from headrace.engine.model.batch import Caches
from headrace.engine.model.load import load_model
from headrace.engine.options import EngineConfig
from headrace.engine.request import ChatOptions, Completion, SamplingParams
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes, plan_caches
from headrace.engine.run.padding import padding_rows
from headrace.engine.run.runner import Model, Runner
from headrace.engine.run.warm_up import warm_up_plans
from headrace.engine.schedule import scheduler as scheduling
from headrace.engine.schedule import sequence as sequences
from headrace.engine.schedule.plan import SlotParams
from headrace.engine.stream import ChoiceReader, Collector, Stream
from headrace.engine.waiting import LoopWaiter, ThreadWaiter
from headrace.kernels import Kernels, select
from headrace.kernels.control import ControlIds
from headrace.tokenizer import (
    ChatError,
    ChatTemplate,
    Rendered,
    TextStream,
    Tokenizer,
    TokenizerError,
    has_chat_template,
)
from headrace.tokenizer import load as load_tokenizer

LOG = logging.getLogger(__name__)
EMBEDDED_MODEL = Path(__file__).parent / "tiny"
EMBEDDED_NAME = "headrace-tiny"
Message = Mapping[str, Any]
Prompt = str | Sequence[int]


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
        name = EMBEDDED_NAME if model is None else path.resolve().name
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
        sizes, dtype = self.sizes, getattr(torch, config.torch_cache_dtype)
        with device.work():  # what is zeroed here is zero before the first step reads it
            slots, pages = sizes.num_slots + sizes.padding, sizes.num_pages + sizes.padding
            caches = Caches.allocate(model_config, slots, pages, sizes.page_size, config.device, dtype)
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
        budget = params.reasoning_budget if options.budget is None else options.budget
        return self._submit(
            rendered.ids,
            params,
            field="messages",
            thinking=rendered.thinking,
            budget=budget,
            raw=False,
            content_from_reasoning=options.force_nonempty_content,
        )

    def prompt_ids(self, messages: Sequence[Message], options: ChatOptions | None = None) -> Rendered:
        """The prompt a conversation becomes: ids, text, and whether it ends inside an open think block."""
        options = options or ChatOptions()
        if self._template is None:
            raise RequestError(f"{self.model_name} has no chat template: use generate()", param="messages")
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
        ids = [self._prompt_ids(one) for one in prompt]  # type: ignore[arg-type]
        for one in ids:
            self._check_prompt(one, "prompt")
        return self._generate_many(ids, params)

    def generate_stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue one prompt as a stream."""
        return self._raw(self._prompt_ids(prompt), params or SamplingParams(), ThreadWaiter())

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.tokenizer.encode_with_markers(prompt)
            except TokenizerError as error:
                raise RequestError(str(error), param="prompt") from error
        if isinstance(prompt, (bytes, bytearray, Mapping)) or not hasattr(prompt, "__iter__"):
            raise RequestError(f"a prompt is text or token ids, got {type(prompt).__name__}", param="prompt")
        return [_token_id(token, self.model_config.vocab_size) for token in prompt]

    def _raw(self, ids: Sequence[int], params: SamplingParams, waiter: ThreadWaiter) -> Stream:
        return self._submit(ids, params, field="prompt", thinking=False, budget=-1, raw=True, waiter=waiter)

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
                        stream = self._raw(ids, params, waiter)
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
        """Stop. With ``drain``, requests already accepted may finish, within ``timeout`` seconds; the rest abort."""
        self._loop.close(drain, timeout)
        self._kernels.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------

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
        ids: Sequence[int],
        params: SamplingParams,
        *,
        field: str,
        thinking: bool,
        budget: int,
        raw: bool,
        waiter: ThreadWaiter | None = None,
        content_from_reasoning: bool = False,
    ) -> Stream:
        self._check_prompt(ids, field)
        prompt = np.array(ids, np.int64)
        slot_params = SlotParams(
            max_tokens=min(params.max_tokens, self.max_context - len(ids)),
            temperature=params.temperature,
            top_p=params.top_p,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            choice=0,
            thinking=thinking,
            budget=budget,
            ignore_eos=params.ignore_eos,
        )
        waiter = waiter or ThreadWaiter()
        logprobs = params.logprobs or params.top_logprobs > 0
        batch, readers, masks = [], [], []
        for choice in range(params.n):
            inbox = Inbox(waiter)
            sequence = sequences.Sequence(
                prompt,
                replace(slot_params, choice=choice),
                logprobs=logprobs,
                top_logprobs=params.top_logprobs,
                sink=inbox,
            )
            batch.append(sequence)
            if params.mask is not None:
                masks.append(MaskState(params.mask, self.control, thinking, budget))
            readers.append(
                ChoiceReader(
                    choice,
                    inbox,
                    TextStream(self.tokenizer, stop=params.stop, raw=raw, eos_ids=self.control.eos),
                    self.tokenizer,
                    self.control,
                    len(prompt),
                    partial(self._loop.abort, sequence),
                    stop=params.stop,
                    logprobs=logprobs,
                    content_from_reasoning=content_from_reasoning,
                )
            )
        self._loop.submit(batch, masks or None)
        return Stream(readers, waiter, self._loop_waiter)

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


def cache_sizes(model: ModelConfig, config: EngineConfig, device: Device) -> CacheSizes:
    """What fits, see ``plan_caches``."""
    dtype = getattr(torch, config.torch_cache_dtype)
    return plan_caches(
        Caches.allocate(model, 1, 1, config.page_size, device="meta", dtype=dtype),
        device,
        num_slots=config.max_sequences,
        page_size=config.page_size,
        model_context=model.max_position_embeddings,
        max_context=config.max_context,
        num_pages=config.num_pages,
        cache_bytes=config.cache_bytes,
        step_bytes=step_bytes(model, config),
        padding=padding_rows(config.kernels, config.max_sequences),
    )


def step_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """What a step's tensors take on a GPU at most: activations of its rows, logits and scratch of its slots."""
    chunk = config.max_batched_tokens or config.prefill_chunk + config.max_sequences
    widest = max(model.mamba.projection_size if model.mamba else 0, 8 * model.hidden_size)
    # Logits are 4 bytes a token of the vocabulary, the sampler's lists 8; attention leaves 72 partial sums a head.
    attention = 72 * 4 * model.attention.num_heads * (model.attention.head_dim + 2) if model.attention else 0
    moe = 4 * 8 * model.moe.top_k * (model.moe.latent_size or model.hidden_size) if model.moe else 0
    return config.max_sequences * (12 * model.vocab_size + attention) + chunk * (4 * 4 * widest + moe)


def scheduler_limits(config: EngineConfig, sizes: CacheSizes, model: ModelConfig) -> scheduling.Limits:
    """What the scheduler may plan with. A model without Mamba layers may be cut anywhere."""
    boundary = model.mamba.chunk_size if model.mamba else 1
    chunk = -(-config.prefill_chunk // boundary) * boundary
    return scheduling.Limits(
        num_slots=sizes.num_slots,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        prefill_chunk=chunk,
        max_batched_tokens=config.max_batched_tokens or chunk + config.max_sequences,
        boundary=boundary,
        max_context=sizes.max_context,
        preempt_bytes=config.preempt_bytes,
        page_bytes=sizes.page_bytes,
        slot_bytes=sizes.slot_bytes,
    )


def _token_id(token: object, vocab_size: int) -> int:
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
        raise RequestError(f"prompt ids are integers from 0 to {vocab_size - 1}, got {token!r}", param="prompt")
    return int(token)
