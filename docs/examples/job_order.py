"""Put jobs in an order, from what the orders cost.

Eight jobs wait for one machine. A job costs its weight times the moment at which it is done, and the sum over all jobs
is to be small. A network sees the duration and the weight of one job and gives it a score; an order is drawn from the
scores, and the network learns from what the orders cost::

    python docs/examples/job_order.py --layer leave_one_out soft_sort

The best order is known: by falling ratio of weight to duration.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_layers as sl

JOBS, BATCH = 8, 128
LAYERS = ["reinforce", "leave_one_out", "soft_sort"]
OPTIONS = {"leave_one_out": {"num_samples": 4}, "soft_sort": {"num_samples": 4}}


def draw_jobs(count):
    """Durations and weights ``[count, JOBS, 2]``."""
    return torch.rand(count, JOBS, 2) * 0.95 + 0.05


def cost_of(z, jobs):
    """What orders ``[..., JOBS, JOBS]`` cost, and relaxed ones too: weight times the moment when a job is done."""
    durations, weights = (z @ jobs).unbind(-1)  # from the first to the last
    return (weights * durations.cumsum(-1)).sum(-1)


def best_order(jobs):
    """The best order of each row as a permutation matrix."""
    ratio = jobs[..., 1] / jobs[..., 0]
    return nn.functional.one_hot(ratio.argsort(-1, descending=True), JOBS).float()


def train(name, steps, seed):
    """The network, and what its most probable orders cost on new jobs, relative to the best ones."""
    torch.manual_seed(seed)
    layer = sl.create(name, latent_dim=1, family="permutation", num_categories=JOBS, **OPTIONS.get(name, {}))
    network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        jobs = draw_jobs(BATCH)
        sample = layer.sample(network(jobs).squeeze(-1))
        cost = cost_of(sample.z.unflatten(-1, (JOBS, JOBS)), jobs)  # [S, BATCH]
        loss = sample.surrogate(cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        jobs = draw_jobs(10_000)
        chosen = layer.mode(network(jobs).squeeze(-1)).unflatten(-1, (JOBS, JOBS))
        return network, float(cost_of(chosen, jobs).mean() / cost_of(best_order(jobs), jobs).mean())


def draw_scores(axes, network, title):
    """The network's score of every job; along the dotted lines the ratio of weight to duration is the same."""
    grid = torch.linspace(0.05, 1, 60)
    durations, weights = torch.meshgrid(grid, grid, indexing="xy")
    with torch.no_grad():
        scores = network(torch.stack([durations, weights], -1)).squeeze(-1)
    axes.contourf(durations, weights, scores, 20)
    for ratio in (0.25, 0.5, 1, 2, 4):
        axes.plot(grid, ratio * grid, ":", color="white", linewidth=0.8)
    axes.set(xlim=(0.05, 1), ylim=(0.05, 1), xlabel="duration", ylabel="weight", title=title)


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = sl.list_layers(family="permutation")
    parser.add_argument("--layer", nargs="+", default=LAYERS, choices=choices, metavar="L")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)

    torch.manual_seed(0)
    jobs = draw_jobs(10_000)
    as_they_come = float(cost_of(torch.eye(JOBS), jobs).mean() / cost_of(best_order(jobs), jobs).mean())
    title = f"cost above the best; as the jobs come {as_they_come - 1:.1%}"
    table = Table("layer", *[f"seed {seed}" for seed in range(options.seeds)], title=title)
    figure, every = plt.subplots(1, len(options.layer), figsize=(3.4 * len(options.layer), 3.4), squeeze=False)
    for axes, name in zip(every[0], options.layer, strict=True):
        runs = [train(name, options.steps, seed) for seed in range(options.seeds)]
        table.add_row(name, *[f"{cost - 1:.2%}" for _, cost in runs])
        draw_scores(axes, runs[0][0], name)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "job_order.png", dpi=100)
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
