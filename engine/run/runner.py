"""StepPlan -> input tensors -> model -> sampler -> StepResult."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.engine.model.batch import Batch, Caches
from headrace.engine.run.memory import CacheSizes, SavedSequence, restore_sequence, save_sequence
from headrace.engine.schedule.plan import Start, StepPlan, StepResult
from headrace.kernels.control import ControlIds, Finish, Phase
from headrace.kernels.sampling import SamplerState, sample

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

    def __init__(self, model: Model, caches: Caches, sizes: CacheSizes, control: ControlIds, device: str) -> None:
        self.model = model
        self.caches = caches
        self.control = control
        self.device = device
        self.state = SamplerState.allocate(sizes.num_slots, device)
        # One page more than a context needs: a plan made ahead of a result may point one token past the end.
        width = -(-sizes.max_context // sizes.page_size) + 1
        self.page_table = torch.zeros(sizes.num_slots, width, dtype=torch.int32, device=device)
        self._prompts: dict[int, Tensor] = {}  # slot -> [tokens] int64
        self._saved: dict[int, tuple[SavedSequence, Tensor]] = {}  # key -> state, prompt

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan. Raises whatever the model raises; the caller then treats the running batch as lost."""
        self._move_sequences(plan)
        batch = self.inputs(plan)
        if batch.token_ids.numel():
            hidden = self.model.forward(batch, self.caches)
        if not batch.sample_rows.numel():
            return StepResult(NO_TOKENS, NO_TOKENS, NO_TOKENS)
        slots = [plan.decode_slots, *([c.slot] for c in plan.chunks if c.last)]
        return self._sample(plan, self.model.logits(hidden[batch.sample_rows]), torch.cat([_ids(s) for s in slots]))

    def inputs(self, plan: StepPlan) -> Batch:
        """The plan's rows as tensors."""
        slots = _ids(plan.decode_slots).to(self.device)
        tokens = [self.state.last_token[slots]]
        rows = [torch.arange(len(slots), device=self.device)]
        count = len(slots)
        for chunk in plan.chunks:
            tokens.append(self._prompts[chunk.slot][chunk.start : chunk.start + chunk.length])
            count += chunk.length
            if chunk.last:
                rows.append(torch.tensor([count - 1], device=self.device))
        return Batch(
            token_ids=torch.cat(tokens),
            decode_slots=slots,
            decode_positions=self.state.length[slots] - 1,
            chunk_slots=tuple(c.slot for c in plan.chunks),
            chunk_starts=tuple(c.start for c in plan.chunks),
            chunk_lengths=tuple(c.length for c in plan.chunks),
            page_table=self.page_table,
            sample_rows=torch.cat(rows),
        )

    def _move_sequences(self, plan: StepPlan) -> None:
        """Saves, drops, restores, starts and page writes, in this order: a page may be saved and given away at once."""
        for save in plan.saves:
            saved = save_sequence(self.caches, self.state, save.slot, save.pages)
            self._saved[save.key] = saved, self._prompts[save.slot]
        for key in plan.drops:
            self._saved.pop(key, None)  # after a failed step it may never have been saved
        for restore in plan.restores:
            saved, self._prompts[restore.slot] = self._saved.pop(restore.key)
            restore_sequence(saved, self.caches, self.state, restore.slot, restore.pages)
        for start in plan.starts:
            self._start(start)
        if len(plan.page_writes):
            writes = torch.from_numpy(plan.page_writes).to(self.device)
            self.page_table[writes[:, 0], writes[:, 1]] = writes[:, 2].int()

    def _start(self, start: Start) -> None:
        slot, params, state = start.slot, start.params, self.state
        self._prompts[slot] = torch.from_numpy(start.prompt).to(self.device)
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

    def _sample(self, plan: StepPlan, logits: Tensor, slots: Tensor) -> StepResult:
        mask = None
        if plan.masks:
            mask = torch.ones(logits.shape, dtype=torch.bool)
            for row, allowed in plan.masks:
                mask[row] = torch.from_numpy(allowed)
            mask = mask.to(self.device)
        out = sample(
            logits,
            slots.to(self.device),
            self.state,
            self.control,
            mask=mask,
            logprobs=plan.logprobs,
            top_logprobs=plan.top_logprobs,
        )

        def host(tensor: Tensor | None):  # type: ignore[no-untyped-def]
            return None if tensor is None else tensor.cpu().numpy()

        return StepResult(
            host(out.tokens),
            host(out.phases),
            host(out.finish),
            host(out.logprobs),
            host(out.top_ids),
            host(out.top_logprobs),
        )


def _ids(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)
