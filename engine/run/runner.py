"""StepPlan -> input tensors -> model -> sampler -> StepResult."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.engine.model.batch import Batch, Caches
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes, SavedSequence, restore_sequence, save_sequence
from headrace.engine.schedule.plan import Start, StepPlan, StepResult
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

    A step whose rows are all inert (their slots had finished) still runs: inert rows rewrite what they wrote.
    """

    def __init__(
        self, model: Model, kernels: Kernels, caches: Caches, sizes: CacheSizes, control: ControlIds, device: Device
    ) -> None:
        self.model = model
        self.kernels = kernels
        self.caches = caches
        self.control = control
        self.device = device
        self.state = SamplerState.allocate(sizes.num_slots, device.torch)
        # One page more than a context needs: a plan made ahead of a result may point one token past the end.
        # A multiple of 4, so that every slot's row is aligned alike and kernels are compiled once.
        width = -(-(sizes.max_context // sizes.page_size + 2) // 4) * 4
        self.page_table = torch.zeros(sizes.num_slots, width, dtype=torch.int32, device=device.torch)
        # Decode steps of one size find their integers at the same addresses: slots, rows and a page write for each.
        self._integers = torch.empty(5 * sizes.num_slots, dtype=torch.int64, device=device.torch)
        self._prompts: dict[int, Tensor] = {}  # slot -> [tokens] int64
        self._saved: dict[int, tuple[SavedSequence, Tensor]] = {}  # key -> state, prompt

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan and wait for its tokens.

        Raises whatever the model raises; the caller then treats the running batch as lost. Raises DeviceLost if no
        further step can be carried out either.
        """
        try:
            with torch.inference_mode(), self.device.work():
                decided = self._launch(plan)
                copies = [None if t is None else self.device.download(t) for t in decided or ()]
            self.device.wait()
        except Exception:
            self.device.check()
            raise
        if decided is None:
            return StepResult(NO_TOKENS, NO_TOKENS, NO_TOKENS)
        return StepResult(*(None if copy is None else copy.numpy() for copy in copies))  # type: ignore[arg-type]

    def _launch(self, plan: StepPlan) -> tuple[Tensor | None, ...] | None:
        """Queue the whole step; what its rows decide, or None if none of them yields a token."""
        self._move_sequences(plan)
        batch, slots = self.inputs(plan)
        if batch.token_ids.numel():
            hidden = self.model.forward(batch, self.caches)
        if not slots.numel():
            return None
        if plan.chunks:
            hidden = hidden[batch.sample_rows]
        out = self._sample(plan, self.model.logits(hidden), slots)
        return out.tokens, out.phases, out.finish, out.logprobs, out.top_ids, out.top_logprobs

    def inputs(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """The plan's rows as tensors, and the slots [R] of the rows that yield a token. Brings the page table up."""
        decodes, sampled = len(plan.decode_slots), [plan.decode_slots]
        rows = np.arange(decodes + len(plan.chunks))  # of a decode step all rows; else, the chunks' last ones below
        end, count = decodes, decodes
        for chunk in plan.chunks:
            end += chunk.length
            if chunk.last:
                sampled.append(np.array([chunk.slot]))
                rows[count] = end - 1
                count += 1
        # A row crosses into at most one page a step; the writes are filled up, so that shapes follow the rows alone.
        filled = np.full((max(len(plan.page_writes), decodes), 3), NO_WRITE, np.int64)
        filled[: len(plan.page_writes)] = plan.page_writes
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
            mask = self.device.upload_tensor(allowed)
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
