"""What both training stages share: a wall-clock budget with its learning rate, checkpoints, the loop and its log."""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.tiny.network import balance, loads
from benchmarks.tiny.team import Team

LOG_SECONDS = 30.0
SAVE_SECONDS = 120.0


@dataclass
class Progress:
    """Where a run stands. `elapsed` sums over resumed processes, so the schedule continues where it stopped."""

    minutes: float
    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    mixture: dict[str, float] = field(default_factory=dict)
    evaluations: int = 0

    @property
    def done(self) -> float:
        """The spent share of the budget."""
        return min(1.0, self.elapsed / (60 * self.minutes))

    def learning_rate(self, peak: float, warmup_steps: int, stable: float = 0.45, floor: float = 0.01) -> float:
        """Warm up by steps, hold, then fall linearly with the wall clock, so that any machine ends on time."""
        falling = max(0.0, self.done - stable) / (1 - stable)
        return peak * min(1.0, (self.step + 1) / warmup_steps) * (1 - (1 - floor) * falling)


@dataclass
class Trainer:
    """Runs `step` (forward and backward; returns loss and token count) until the budget is spent.

    `evaluate` runs on the leader now and then, and `adapt` hears of its findings on every worker.
    """

    out: Path
    progress: Progress
    modules: dict[str, torch.nn.Module]
    optimizers: list[torch.optim.Optimizer]
    peak: float
    step: Callable[[Progress], tuple[float, int]]
    evaluate: Callable[[], dict[str, float]]
    adapt: Callable[[Progress, dict[str, float]], None]
    evaluations: int
    name: str
    team: Team = field(default_factory=Team)
    warmup_steps: int = 100

    @property
    def checkpoint(self) -> Path:
        return self.out / f"{self.name}.pt"

    def save(self) -> None:
        """Write the checkpoint beside the old one and swap, so that a kill leaves one of the two."""
        if not self.team.leads:
            return
        state = {
            "progress": vars(self.progress),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def begin(self, resume: bool) -> None:
        """Continue from the checkpoint, or refuse to overwrite one; the budget is the one asked for now."""
        if resume and not self.checkpoint.is_file():
            raise SystemExit(f"{self.checkpoint} is not there to be resumed")
        if not resume and self.checkpoint.is_file():
            raise SystemExit(f"{self.checkpoint} exists: add --resume to continue it, or choose another --out")
        if resume:
            self.resume()

    def resume(self) -> None:
        """Load the checkpoint."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.progress = Progress(**state["progress"] | {"minutes": self.progress.minutes})
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def update(self) -> None:
        """Average the gradients over the team, clip and apply them, and balance the experts."""
        trained = [each for module in self.modules.values() for each in module.parameters() if each.requires_grad]
        gradients = [each.grad for each in trained if each.grad is not None]
        self.team.average(gradients + loads(self.modules.values()))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for module in self.modules.values():
            balance(module)

    def log(self, **values: object) -> None:
        if not self.team.leads:
            return
        line = {"stage": self.name, "step": self.progress.step, "tokens": self.progress.tokens}
        line |= {"seconds": round(self.progress.elapsed), **values}
        with (self.out / "log.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        tqdm.write(json.dumps(line))

    def set_rate(self) -> float:
        rate = self.progress.learning_rate(self.peak, self.warmup_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def examine(self) -> None:
        """Evaluate on the leader, tell everyone, and write it down."""
        self.progress.evaluations = int(self.progress.done * self.evaluations)
        found = self.team.told(self.evaluate() if self.team.leads else None)
        self.adapt(self.progress, found)
        self.log(**{name: round(value, 3) for name, value in found.items()})

    def run(self) -> None:
        """The loop. Evaluates at evenly spaced shares of the budget and saves every two minutes."""
        progress = self.progress
        clock, logged, saved = time.monotonic() - progress.elapsed, progress.elapsed, progress.elapsed
        losses: list[float] = []
        silent = None if self.team.leads else True
        bar = tqdm(total=100, desc=self.name, disable=silent, bar_format="{l_bar}{bar}| {postfix}")
        while progress.done < 1:
            rate = self.set_rate()
            loss, tokens = self.step(progress)
            self.update()
            losses.append(loss)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
            progress.elapsed = self.team.told(time.monotonic() - clock)
            if progress.elapsed - logged > LOG_SECONDS:
                speed = len(losses) * tokens / (progress.elapsed - logged)
                mean = sum(losses) / len(losses)
                self.log(loss=round(mean, 4), rate=round(rate, 6), tokens_per_second=round(speed))
                logged, losses = progress.elapsed, []
            if progress.done >= (progress.evaluations + 1) / self.evaluations:
                self.examine()
            if progress.elapsed - saved > SAVE_SECONDS:
                self.save()
                saved = progress.elapsed
            bar.update(100 * progress.done - bar.n)
            bar.set_postfix(step=progress.step, loss=f"{loss:.3f}")
        bar.close()
        self.save()


def arguments(description: str, minutes: float) -> argparse.ArgumentParser:
    """The options of both stages."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of checkpoints and log.jsonl")
    parser.add_argument("--minutes", type=float, default=minutes, help="wall-clock budget over all resumed runs")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--compile", action="store_true", help="torch.compile: twice as fast after two minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16, help="packed rows of 320 tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=2, help="processes that share a step, one thread each")
    parser.add_argument("--evaluations", type=int, default=19, help="evenly spaced over the budget")
    return parser
