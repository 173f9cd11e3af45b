"""Muon for the hidden matrices, AdamW for everything else."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest orthogonal matrix (of each matrix of a stack), by the quintic Newton-Schulz iteration."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised and scaled to AdamW's usual step size; stacks of experts are one parameter.

    torch.optim.Muon takes matrices only, which would mean one parameter per expert.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(state["momentum"], group["momentum"]))
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def build(network: nn.Module, lr: float, muon: bool = True) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable parameters of `network`."""
    hidden: list[Tensor] = []
    other: list[Tensor] = []
    never = ("embeddings", "lm_head", "conv1d", "gate")
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not any(part in name for part in never)
            (hidden if muon and matrix else other).append(parameter)
    adam = torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    return [adam, Muon(hidden, lr=lr)] if hidden else [adam]
