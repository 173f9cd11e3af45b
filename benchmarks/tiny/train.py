"""Train the tiny model's backbone: `python -m benchmarks.tiny.train --minutes 95 --compile`.

Everything is seeded and every random choice is a function of (seed, step). The learning rate follows the wall clock,
so a slower machine ends on time with fewer tokens; that is the one thing a rerun does not repeat exactly.
"""

from argparse import Namespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny import data, optimizer, problems
from benchmarks.tiny.network import Config, Network
from benchmarks.tiny.run import Progress, Trainer, arguments
from benchmarks.tiny.team import Team, spread

HELD_OUT = 48
CURRICULUM_FROM = 0.4
"""After this share of the budget, categories that the evaluation finds weak get up to four times their weight."""


def loss_of(network: Network, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy over learned positions; the output layer runs on those positions only."""
    learned = (targets.flatten() >= 0).nonzero().squeeze(1)
    each = F.cross_entropy(network.lm_head(hidden.flatten(0, 1)[learned]), targets.flatten()[learned], reduction="none")
    weight = weights.flatten()[learned]
    return (each * weight).sum() / weight.sum()


@torch.no_grad()
def exact(network: Network, examples: list[data.Example], rows: int = 16) -> list[bool]:
    """Per example: is every learned token the argmax? Traces are deterministic, so then greedy decoding is right."""
    network.eval()
    verdicts = {}
    packed = data.pack(examples)
    for start in range(0, len(packed), rows):
        group = packed[start : start + rows]
        batch = data.collate(group)
        hidden = network(batch.ids, network.packing(batch.document))
        wrong = (network.lm_head(hidden).argmax(-1) != batch.targets) & (batch.targets >= 0)
        for index, row in enumerate(group):
            for number, item in enumerate(row):
                verdicts[id(item)] = not bool(wrong[index][batch.document[index] == number].any())
    network.train()
    return [verdicts.get(id(item), False) for item in examples]


def accuracy(network: Network, count: int = HELD_OUT, seed: int = 0) -> dict[str, float]:
    """Held-out exact match per category at high effort, and over all categories at low effort and without reasoning."""
    result = {}
    drawn = {name: problems.held_out(name, count, seed) for name in problems.CATEGORIES}
    for name, items in drawn.items():
        verdicts = exact(network, [data.example(item, "high") for item in items])
        result[name] = sum(verdicts) / len(verdicts)
    for effort in ("low", "none"):
        few = [data.example(item, effort) for items in drawn.values() for item in items[: count // 4]]
        verdicts = exact(network, few)
        result[effort] = sum(verdicts) / len(verdicts)
    return result


def curriculum(found: dict[str, float], done: float) -> dict[str, float]:
    """The mixture for the next stretch."""
    if done < CURRICULUM_FROM:
        return dict(problems.CATEGORIES)
    return {name: weight * (1 + 3 * (1 - found[name])) for name, weight in problems.CATEGORIES.items()}


def adapt(progress: Progress, found: dict[str, float]) -> None:
    progress.mixture = curriculum(found, progress.done)


def work(team: Team, args: Namespace) -> None:
    """One worker's whole run."""
    torch.manual_seed(args.seed)
    network = Network(Config())
    optimizers = optimizer.build(network, args.rate, muon=not args.adamw)
    backbone = torch.compile(network.backbone) if args.compile else network.backbone

    def step(progress: Progress) -> tuple[float, int]:
        batch = data.batch(args.seed, progress.step, args.rows, progress.mixture)
        mine = batch.map(team.rows)
        loss = loss_of(network, backbone(mine.ids, network.packing(mine.document)), mine.targets, mine.weights)
        loss.backward()
        return loss.item(), batch.ids.numel()

    progress = Progress(args.minutes, mixture=dict(problems.CATEGORIES))
    trainer = Trainer(
        args.out, progress, {"network": network}, optimizers, args.rate, step, lambda: accuracy(network), adapt,
        args.evaluations, "backbone", team,
    )  # fmt: skip
    trainer.begin(args.resume)
    trainer.run()


def main() -> None:
    parser = arguments(__doc__, minutes=95)
    parser.add_argument("--adamw", action="store_true", help="AdamW for all parameters instead of Muon for matrices")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    spread(work, args, args.workers)


if __name__ == "__main__":
    main()
