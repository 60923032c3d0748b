"""Variance of the gradient that ranks average, over that of one rank: with noise of their own, and with shared noise.

`python scale_variance.py` prints the table of docs/scaling.md (simulated ranks); under torchrun, `scale_variance.py ddp
FILE` measures it on the ranks there are, whose gradients DistributedDataParallel averages.
"""

import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from scale_runs import build
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_modules import ReproducibleNoise

KINDS = {
    "pathwise (`gaussian`)": "gaussian",
    "score function (`reinforce`, no baseline)": "reinforce:none",
    "score function (`leave_one_out`)": "leave_one_out",
    "coupled (`disarm`)": "disarm",
}
BLOCKS = 20


class Position:
    """What ReproducibleNoise asks a Trainer: where this rank is."""

    def __init__(self, rank):
        self.global_rank, self.current_epoch = rank, 0
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


def gradients(model, x, draws, rank, mode):
    """``[draws, *]``: gradients of the mean loss at the last layer of the encoder, the noise redrawn."""
    *below, head = model.encoder
    hidden = nn.Sequential(*below)(x)
    params = head(hidden).detach()
    ReproducibleNoise(seed=0, mode=mode).on_train_batch_start(Position(rank), model, x, 0)
    leaf = params.repeat(draws, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss(model.terms(x.repeat(draws, 1, 1, 1), leaf)).sum(), leaf)
    return torch.einsum("rbi,bh->rih", gradient.view(draws, *params.shape), hidden.detach()).flatten(1) / len(x)


def ratio(every, ranks):
    """Variance of the mean over the first ranks of ``every`` ``[ranks, draws, n]`` over their own; its error."""
    own = every[:ranks]
    blocks = [float(part.mean(0).var(0).sum() / part.var(1).sum(-1).mean()) for part in own.chunk(BLOCKS, 1)]
    blocks = torch.tensor(blocks)
    return float(blocks.mean()), float(blocks.std() / BLOCKS**0.5)


def table(name, draws, most=8):
    """By number of ranks with different data: the ratio and its error with own noise, and with shared noise."""
    model = build(name)
    data = torch.rand(most, 16, 1, 4, 4, generator=torch.Generator().manual_seed(2)).round()
    every = {
        mode: torch.stack([gradients(model, x, draws, rank, mode) for rank, x in enumerate(data)])
        for mode in ("per_rank", "shared")
    }
    return {ranks: (*ratio(every["per_rank"], ranks), *ratio(every["shared"], ranks)) for ranks in (2, 4, 8)}


class Step(nn.Module):
    """The loss of a batch, as DistributedDataParallel wants it: in one forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.loss(self.model.terms(x)).mean()


def under_ddp(name, mode, steps=400):
    """The ratio, of gradients that DistributedDataParallel has averaged."""
    rank = dist.get_rank()
    model = build(name)
    x = torch.rand(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(2)).round()[rank]
    wrapped, noise = DistributedDataParallel(Step(model)), ReproducibleNoise(seed=0, mode=mode)
    averaged, local = [], []
    for step in range(steps):
        for rows, loss_of in ((averaged, wrapped), (local, wrapped.module)):
            noise.on_train_batch_start(Position(rank), model, x, step)
            model.zero_grad()
            loss_of(x).backward()
            rows.append(model.encoder[-1].weight.grad.flatten().clone())
    averaged, local = torch.stack(averaged), torch.stack(local)
    blocks = []
    for mean, own in zip(averaged.chunk(BLOCKS), local.chunk(BLOCKS), strict=True):
        variance = own.var(0).sum()
        dist.all_reduce(variance)
        blocks.append(float(mean.var(0).sum() / (variance / dist.get_world_size())))
    blocks = torch.tensor(blocks)
    return float(blocks.mean()), float(blocks.std() / BLOCKS**0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["ddp"]:
        dist.init_process_group("gloo")
        result = {kind: (*under_ddp(name, "per_rank"), *under_ddp(name, "shared")) for kind, name in KINDS.items()}
        if os.environ["RANK"] == "0":
            torch.save(result, sys.argv[2])
            print(result)
        dist.barrier()
        dist.destroy_process_group()
    else:
        print("| layer | noise | 2 ranks | 4 ranks | 8 ranks |\n|---|---|---|---|---|")
        for kind, name in KINDS.items():
            rows = table(name, draws=4000)
            for label, at in (("own", 0), ("shared", 2)):
                cells = [f"{row[at]:.3f} ± {row[at + 1]:.3f}" for row in rows.values()]
                print(f"| {kind} | {label} | " + " | ".join(cells) + " |")
