"""The speculative head: `python -m benchmarks.tiny.mtp --minutes 8`, after benchmarks.tiny.train has finished.

The backbone is frozen and teaches: the head learns the backbone's own greedy choice, which is what verification will
compare its drafts with. Drafts two and three reuse the head on its own output, as the engine does.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny import data, optimizer, problems
from benchmarks.tiny.network import Attention, Config, LatentMoE, Network, Packing, RMSNorm, linear
from benchmarks.tiny.run import Progress, Trainer, arguments
from benchmarks.tiny.team import Team, spread

DRAFTS = 3
DRAFT_WEIGHTS = (1.0, 0.4, 0.2)


class MtpAttention(nn.Module):
    """`mtp.layers.0`: joins the next token's embedding with the hidden state, then attends."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.enorm, self.hnorm, self.norm = (RMSNorm(size, epsilon) for _ in range(3))
        self.eh_proj = linear(2 * size, size)
        self.mixer = Attention(config, 0.5)

    def forward(self, embedded: Tensor, hidden: Tensor, packing: Packing) -> Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return x + self.mixer(self.norm(x), packing)


class MtpMoE(nn.Module):
    """`mtp.layers.1`: the expert layer and the norm before the shared output layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm, self.final_layernorm = (RMSNorm(config.hidden_size, config.layer_norm_epsilon) for _ in range(2))
        self.mixer = LatentMoE(config, 0.5)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return self.final_layernorm(x + self.mixer(self.norm(x), packing))


class Mtp(nn.Module):
    """One draft step for every position: hidden state at t and token t+1 give the hidden state that predicts t+2."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MtpAttention(config), MtpMoE(config)])

    def forward(self, embedded: Tensor, hidden: Tensor, packing: Packing) -> Tensor:
        attention, experts = self.layers
        return experts(attention(embedded, hidden, packing), packing)


def ahead(values: Tensor, places: int, fill: int) -> Tensor:
    """`values[:, t + places]` at position t; `fill` past the end."""
    return F.pad(values[:, places:], (0, places), value=fill)


def drafts(
    network: Network, teacher: Callable[..., Tensor], head: Callable[..., Tensor], batch: data.Batch
) -> list[tuple[Tensor, Tensor]]:
    """Per draft depth: the logits at learned positions and the frozen backbone's greedy choice there.

    `teacher` and `head` may be compiled forms of the network and the head.
    """
    packing = network.packing(batch.document)
    with torch.no_grad():
        hidden = teacher(batch.ids, packing)
        greedy = network.lm_head(hidden).argmax(-1).masked_fill(batch.targets < 0, -100)
    result = []
    for depth in range(1, DRAFTS + 1):
        same = ahead(batch.document, depth, -1) == batch.document
        embedded = network.backbone.embeddings(ahead(batch.ids, depth, 0))
        hidden = head(embedded, hidden, packing)
        wanted = ahead(greedy, depth, -100).masked_fill(~same, -100).flatten()
        learned = (wanted >= 0).nonzero().squeeze(1)
        result.append((network.lm_head(hidden.flatten(0, 1)[learned]), wanted[learned]))
    return result


@torch.no_grad()
def agreement(network: Network, head: Mtp, count: int = 8, seed: int = 1) -> dict[str, float]:
    """Held-out share of drafts, by depth, that equal the backbone's greedy token (on the reference text)."""
    head.eval()
    examples = []
    for name in problems.CATEGORIES:
        examples += [data.example(problem, "high") for problem in problems.held_out(name, count, seed)]
    batch = data.collate(data.pack(examples))
    rates = [
        (logits.argmax(-1) == wanted).float().mean().item() for logits, wanted in drafts(network, network, head, batch)
    ]
    head.train()
    return {f"draft_{depth}": rate for depth, rate in enumerate(rates, 1)}


def work(team: Team, args: Namespace) -> None:
    """One worker's whole run."""
    torch.manual_seed(args.seed)
    network = Network(Config())
    network.load_state_dict(torch.load(args.out / "backbone.pt", weights_only=True)["modules"]["network"])
    network.requires_grad_(False).eval()
    head = Mtp(Config())
    optimizers = optimizer.build(head, args.rate)
    teacher, student = (torch.compile(each) if args.compile else each for each in (network, head))

    def step(progress: Progress) -> tuple[float, int]:
        whole = data.batch(args.seed + 1, progress.step, args.rows, problems.CATEGORIES)
        batch = whole.map(team.rows)
        losses = [F.cross_entropy(*draft) for draft in drafts(network, teacher, student, batch)]
        torch.stack([weight * loss for weight, loss in zip(DRAFT_WEIGHTS, losses, strict=True)]).sum().backward()
        return losses[0].item(), whole.ids.numel()

    trainer = Trainer(
        args.out, Progress(args.minutes), {"head": head}, optimizers, args.rate, step,
        lambda: agreement(network, head), lambda progress, found: None, args.evaluations, "mtp", team, warmup_steps=20,
    )  # fmt: skip
    trainer.begin(args.resume)
    trainer.run()


def main() -> None:
    args = arguments(__doc__, minutes=8).parse_args()
    spread(work, args, args.workers)


if __name__ == "__main__":
    main()
