"""A scheduler, loop and runner with N sequences in the middle of their answers: what the host benchmarks time."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.loop import EngineLoop, Inbox
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes
from headrace.engine.run.runner import Runner
from headrace.engine.schedule.plan import SlotParams, StepPlan, StepResult
from headrace.engine.schedule.scheduler import Limits, Scheduler
from headrace.engine.schedule.sequence import Sequence
from headrace.engine.stream import ChoiceReader
from headrace.engine.waiting import ThreadWaiter
from headrace.kernels import select
from headrace.kernels.control import ControlIds, Phase
from headrace.tokenizer import StopMatcher, TextStream
from headrace.tokenizer import load as load_tokenizer

PAGE_SIZE = 16
CONTEXT = 4096
CHUNK = 128
TOKEN = 300  # an ordinary piece of the embedded model's vocabulary

# The caches of this configuration are a few bytes: the host's part does not depend on their size.
SMALL = {
    "model_type": "nemotron_h", "hidden_size": 8, "vocab_size": 64, "hybrid_override_pattern": "M*",
    "num_hidden_layers": 2, "mamba_num_heads": 1, "mamba_head_dim": 1, "n_groups": 1, "ssm_state_size": 1,
    "conv_kernel": 2, "chunk_size": CHUNK, "use_conv_bias": False, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 1, "layer_norm_epsilon": 1e-5, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
}  # fmt: skip


class NoModel:
    """Stands where the model would be; the host benchmarks stop at its door."""

    def forward(self, batch: Batch, caches: Caches) -> torch.Tensor:
        return batch.token_ids[:, None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden), 64)


class DecodingBatch:
    """``count`` sequences that decode, each its own request with its own reader; one plan is in flight.

    ``stops``: every request has a stop string, so the engine thread makes the text of every token.
    """

    def __init__(self, count: int, stops: bool = False) -> None:
        pages = count * (CONTEXT // PAGE_SIZE)
        self.scheduler = Scheduler(Limits(count, pages, PAGE_SIZE, CHUNK, CHUNK + count, CHUNK, CONTEXT))
        sizes = CacheSizes(count, pages, PAGE_SIZE, CONTEXT, 1, 1)
        caches = Caches.allocate(ModelConfig.from_json(SMALL), count, 1, PAGE_SIZE)
        self.runner = Runner(NoModel(), select(), caches, sizes, ControlIds(eos=()), Device("cpu"))
        self.loop = EngineLoop(self.scheduler, self.runner, count, 64)
        tokenizer = load_tokenizer(EMBEDDED_MODEL)
        self.readers = []
        for i in range(count):
            params = SlotParams(CONTEXT, 1.0, 1.0, i, 0, False, -1, True)
            inbox = Inbox(ThreadWaiter())
            sequence = Sequence(np.arange(1 + i % PAGE_SIZE, dtype=np.int64) % 60, params, sink=inbox)
            stop = StopMatcher(["never"]) if stops else None
            text = TextStream(tokenizer, stop=stop)
            control = self.runner.control
            self.readers.append(
                ChoiceReader(
                    0,
                    inbox,
                    text,
                    tokenizer,
                    control,
                    1,
                    partial(self.loop.abort, sequence),
                    stop=stop,
                )
            )
            self.scheduler.submit(sequence)
            self.loop._live[sequence] = None
        plan = self.scheduler.schedule()
        while len(self.scheduler._decoding) < count or len(plan.decode_slots) < count:
            self.runner._move_sequences(plan)
            rows = len(plan.decode_slots) + sum(c.last for c in plan.chunks)
            self.scheduler.commit(self.result(rows))
            plan = self.scheduler.schedule()
        self.next_result = self.result(count)

    @staticmethod
    def result(rows: int) -> StepResult:
        return StepResult(
            np.full(rows, TOKEN, np.int64), np.full(rows, int(Phase.OFF), np.int64), np.zeros(rows, np.int64)
        )

    def host_step(self) -> Batch:
        """From a StepResult to the next launch: commit, hand out tokens, schedule, build the input tensors."""
        self.loop._publish(self.scheduler.commit(self.next_result))
        plan = self.scheduler.schedule()
        assert plan is not None
        self.runner._move_sequences(plan)
        return self.runner.inputs(plan)[0]

    def drain(self) -> None:
        """Take what has arrived off the readers' hands, as their threads do; a heap that only grows is slow."""
        self.read()

    def read(self) -> int:
        """What the readers do with one step's tokens, in their own threads: text and events."""
        return sum(len(reader.events()) for reader in self.readers)

    def plan_step(self) -> StepPlan:
        """The scheduler alone: commit and schedule."""
        self.scheduler.commit(self.next_result)
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan
