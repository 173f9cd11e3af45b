"""StepPlan -> input tensors -> model -> sampler -> StepResult."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.engine.model.batch import Batch, Caches
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes, SavedSequence, restore_sequence, save_sequence
from headrace.engine.run.padding import padded_size
from headrace.engine.schedule.plan import IntArray, Start, StepPlan, StepResult
from headrace.kernels import Kernels
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.inputs import NO_WRITE
from headrace.kernels.sampling import Sampled, SamplerState

NO_TOKENS = np.empty(0, np.int64)


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, batch: Batch, caches: Caches) -> Tensor:
        """Hidden states [rows, hidden] after the final norm; writes the rows' keys, values and states."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab] fp32."""


class Runner:
    """Owns the caches and the per-slot arrays; executes plans in the order they were made.

    A step whose rows are all inert (their slots had finished) still runs: inert rows rewrite what they wrote. Slots
    begin that way, as sequences of one token that have finished, and those beyond the scheduler's remain so: they are
    the padding rows of decode steps (``run.padding``).
    """

    def __init__(
        self, model: Model, kernels: Kernels, caches: Caches, sizes: CacheSizes, control: ControlIds, device: Device
    ) -> None:
        self.model = model
        self.kernels = kernels
        self.caches = caches
        self.control = control
        self.device = device
        self.sizes = sizes
        slots = sizes.num_slots + sizes.padding
        self.state = SamplerState.allocate(slots, device.torch)
        # One page more than a context needs: a plan made ahead of a result may point one token past the end.
        # A multiple of 4, so that every slot's row is aligned alike and kernels are compiled once.
        width = -(-(sizes.max_context // sizes.page_size + 2) // 4) * 4
        self.page_table = torch.zeros(slots, width, dtype=torch.int32, device=device.torch)
        # Decode steps of one size find their integers at the same addresses: slots, rows and a page write for each.
        self._integers = torch.empty(5 * sizes.num_slots, dtype=torch.int64, device=device.torch)
        self._allowed: Tensor | None = None  # memory for masks, from the first one on: bool, a row for each slot
        self._padding_slots = np.arange(sizes.num_slots, slots)
        self._prompts: dict[int, Tensor] = {}  # slot -> [tokens] int64
        self._saved: dict[int, tuple[SavedSequence, Tensor]] = {}  # key -> state, prompt
        self._finish_all()

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan and wait for its tokens.

        Raises whatever the model raises; the caller then treats the running batch as lost. Raises DeviceLost if no
        further step can be carried out either.
        """
        try:
            with torch.inference_mode(), self.device.work():
                decided = self._launch(plan)
                if decided is not None:
                    copy = self.device.download(decided.integers)
                    more = (decided.logprobs, decided.top_ids, decided.top_logprobs)
                    more_copies = [None if t is None else self.device.download(t) for t in more]
            self.device.wait()
        except Exception:
            self.device.check()
            raise
        if decided is None:
            return StepResult(NO_TOKENS, NO_TOKENS, NO_TOKENS)
        rows = len(plan.decode_slots) + sum(chunk.last for chunk in plan.chunks)  # padding rows come after these
        return StepResult(*copy.numpy()[:, :rows], *(None if t is None else t.numpy()[:rows] for t in more_copies))

    def warm_up(self, plans: Iterable[StepPlan]) -> None:
        """Carry out plans before the first sequence starts, then forget all that they left behind."""
        pages: set[int] = set()
        for plan in plans:
            self.execute(plan)
            pages.update(plan.page_writes[:, 2].tolist())
        self._prompts.clear()
        with self.device.work():
            for state in (*self.caches.conv, *self.caches.ssm, self.page_table):
                state.zero_()
            [index] = self.device.upload([np.array(sorted(pages), np.int64)])
            for layer in (*self.caches.keys, *self.caches.values):
                layer[index] = 0
            for field in fields(self.state):
                getattr(self.state, field.name).zero_()
            self._finish_all()
        self.device.wait()

    def _finish_all(self) -> None:
        """Make every slot of a new state a sequence of one token that has finished; see ``run.padding``."""
        self.state.length.fill_(1)
        self.state.finish.fill_(int(Finish.LENGTH))
        first, device = self.sizes.num_slots, self.page_table.device
        pages = torch.arange(self.sizes.padding, dtype=torch.int32, device=device) + self.sizes.num_pages
        self.page_table[first:, 0] = pages

    def _launch(self, plan: StepPlan) -> Sampled | None:
        """Queue the whole step; what its rows decide, or None if none of them yields a token."""
        self._move_sequences(plan)
        batch, slots = self.inputs(plan)
        if batch.token_ids.numel():
            hidden = self.model.forward(batch, self.caches)
        if not slots.numel():
            return None
        if plan.chunks:
            hidden = hidden[batch.sample_rows]
        return self._sample(plan, self.model.logits(hidden), slots)

    def inputs(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """The plan's rows as tensors, and the slots [R] of the rows that yield a token. Brings the page table up.

        A step that only decodes is padded: every tensor of it is at an address that follows its padded size alone.
        """
        decode_slots = plan.decode_slots if plan.chunks else self._padded(plan.decode_slots)
        decodes, sampled = len(decode_slots), [decode_slots]
        rows = np.arange(decodes + len(plan.chunks))  # of a decode step all rows; else, the chunks' last ones below
        end, count = decodes, decodes
        for chunk in plan.chunks:
            end += chunk.length
            if chunk.last:
                sampled.append(np.array([chunk.slot]))
                rows[count] = end - 1
                count += 1
        # A row crosses into at most one page a step; the writes are filled up, so that shapes follow the rows alone.
        writes = plan.page_writes
        if len(writes) > decodes and not plan.chunks:  # a sequence came back with all its pages
            self._write_pages(writes[decodes:])
            writes = writes[:decodes]
        filled = np.full((max(len(writes), decodes), 3), NO_WRITE, np.int64)
        filled[: len(writes)] = writes
        slots, sample_rows, page_writes = self.device.upload(
            [np.concatenate(sampled), rows[:count], filled], self._integers
        )
        prompts = [self._prompts[c.slot][c.start : c.start + c.length] for c in plan.chunks]
        token_ids, positions = self.kernels.step_inputs(
            self.state.last_token,
            self.state.length,
            slots[:decodes],
            torch.cat(prompts) if prompts else slots[:0],
            self.page_table,
            page_writes,
        )
        batch = Batch(
            token_ids=token_ids,
            decode_slots=slots[:decodes],
            decode_positions=positions,
            chunk_slots=tuple(c.slot for c in plan.chunks),
            chunk_starts=tuple(c.start for c in plan.chunks),
            chunk_lengths=tuple(c.length for c in plan.chunks),
            page_table=self.page_table,
            sample_rows=sample_rows,
        )
        return batch, slots

    def _padded(self, slots: IntArray) -> IntArray:
        """The slots of a decode step and, behind them, those of its padding rows."""
        if not self.sizes.padding:
            return slots
        missing = padded_size(len(slots), self.sizes.num_slots) - len(slots)
        return np.concatenate([slots, self._padding_slots[:missing]]) if missing else slots

    def _write_pages(self, page_writes: IntArray) -> None:
        """Page writes [W, 3] in a launch of their own."""
        [writes] = self.device.upload([page_writes])
        none = torch.empty(0, dtype=torch.int64, device=self.device.torch)
        self.kernels.step_inputs(self.state.last_token, self.state.length, none, none, self.page_table, writes)

    def _move_sequences(self, plan: StepPlan) -> None:
        """Saves, drops, restores and starts, in this order: a page may be saved and given away at once."""
        for save in plan.saves:
            saved = save_sequence(self.device, self.caches, self.state, save.slot, save.pages)
            self._saved[save.key] = saved, self._prompts[save.slot]
        for key in plan.drops:
            self._saved.pop(key, None)  # after a failed step it may never have been saved
        for restore in plan.restores:
            saved, self._prompts[restore.slot] = self._saved.pop(restore.key)
            restore_sequence(self.device, saved, self.caches, self.state, restore.slot, restore.pages)
        for start in plan.starts:
            self._start(start)

    def _start(self, start: Start) -> None:
        slot, params, state = start.slot, start.params, self.state
        [self._prompts[slot]] = self.device.upload([start.prompt])
        state.last_token[slot] = int(start.prompt[-1])
        state.length[slot] = len(start.prompt)
        state.tokens_left[slot] = params.max_tokens
        state.phase[slot] = Phase.THINKING if params.thinking and self.control.closing else Phase.OFF
        state.remaining[slot] = params.budget
        state.cursor[slot] = 0
        state.finish[slot] = Finish.NONE
        state.temperature[slot] = params.temperature
        state.top_p[slot] = params.top_p
        state.seed[slot] = params.seed - (1 << 64) if params.seed >= 1 << 63 else params.seed
        state.choice[slot] = params.choice
        state.ignore_eos[slot] = params.ignore_eos

    def _sample(self, plan: StepPlan, logits: Tensor, slots: Tensor) -> Sampled:
        mask = None
        if plan.masks:
            allowed = torch.ones(logits.shape, dtype=torch.bool)
            for row, tokens in plan.masks:
                allowed[row] = torch.from_numpy(tokens)
            if self._allowed is None:
                size = self.sizes.num_slots * logits.shape[1]
                self._allowed = torch.empty(size, dtype=torch.bool, device=self.device.torch)
            mask = self.device.upload_tensor(allowed, self._allowed)
        sampled: Sampled = self.kernels.sample(
            logits,
            slots,
            self.state,
            self.control,
            mask=mask,
            logprobs=plan.logprobs,
            top_logprobs=plan.top_logprobs,
        )
        return sampled
