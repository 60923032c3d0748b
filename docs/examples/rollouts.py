"""An agent in a maze: one random action after another, and a reward at the end.

The maze is plain Python. Each action is drawn by the same layer, called once for each step inside ``sl.capture()``, and
``sl.surrogate`` credits every call with the number of steps that it took to get out. Compared are baselines::

    python docs/examples/rollouts.py --baseline none moving_average learned
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_layers as sl

MAZE = [
    "..#....",
    ".##.##.",
    "....#..",
    ".##...#",
    "..#.#..",
    "#...#.E",
]
CELLS = [(r, c) for r, row in enumerate(MAZE) for c, cell in enumerate(row) if cell != "#"]
EXIT = next(i for i, (r, c) in enumerate(CELLS) if MAZE[r][c] == "E")
MOVES = [(-1, 0), (0, 1), (1, 0), (0, -1)]
LIMIT = 40  # steps of one walk
BASELINES = ["none", "moving_average", "learned"]


def neighbours():
    """The cell that each move leads to ``[number of cells, 4]``; into a wall means to stay."""
    index = {cell: i for i, cell in enumerate(CELLS)}
    return torch.tensor([[index.get((r + dr, c + dc), index[r, c]) for dr, dc in MOVES] for r, c in CELLS])


def shortest():
    """Steps to the exit from every cell."""
    steps, table = torch.full((len(CELLS),), float("inf")), neighbours()
    steps[EXIT] = 0
    for _ in CELLS:
        steps = torch.minimum(steps, 1 + steps[table].amin(-1))
    return steps


def walk(policy, layer, start):
    """Steps to the exit ``[B]``, at most LIMIT, of walks from cells ``[B]``."""
    table, cell = neighbours(), start
    steps = torch.zeros(len(start))
    for _ in range(LIMIT):
        action = layer(policy(cell)).detach().argmax(-1)  # the maze takes a number; its answer has no gradient
        steps += cell != EXIT
        cell = torch.where(cell == EXIT, cell, table[cell, action])
    return steps


def train(baseline, iterations, seed):
    """The policy, its mean steps to the exit in each iteration, and those after training."""
    torch.manual_seed(seed)
    layer = sl.create("reinforce", latent_dim=1, family="categorical", num_categories=4, baseline=baseline)
    policy = nn.Embedding(len(CELLS), 4, _weight=torch.zeros(len(CELLS), 4))
    optimizer = torch.optim.Adam([*policy.parameters(), *layer.parameters()], lr=0.05)
    curve = []
    for _ in range(iterations):
        with sl.capture() as samples:
            steps = walk(policy, layer, torch.randint(len(CELLS), (64,)))
        loss = sl.surrogate(steps, samples).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(steps.mean().item())
    layer.eval()
    with torch.no_grad():
        found = walk(policy, layer, torch.arange(len(CELLS)).repeat(20)).mean()
    return policy, curve, float(found)


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", nargs="+", default=BASELINES, choices=BASELINES)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)

    best = float(shortest().mean())
    table = Table("baseline", "steps to the exit", title=f"{options.seeds} seeds; the shortest way takes {best:.2f}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for baseline in options.baseline:
        runs = [train(baseline, options.iterations, seed) for seed in range(options.seeds)]
        table.add_row(baseline, ", ".join(f"{found:.2f}" for _, _, found in runs))
        left.plot(torch.tensor([curve for _, curve, _ in runs]).mean(0), label=baseline)
    left.axhline(best, color="black", linewidth=0.8, linestyle=":", label="shortest way")
    left.set(xlabel="iteration (64 walks)", ylabel="steps to the exit", yscale="log")
    left.legend()
    policy = runs[-1][0].weight.detach().softmax(-1)
    right.imshow([[cell == "#" for cell in row] for row in MAZE], cmap="gray_r", alpha=0.7)
    for (r, c), probs in zip(CELLS, policy, strict=True):
        if MAZE[r][c] != "E":
            dr, dc = MOVES[int(probs.argmax())]
            right.arrow(c - 0.25 * dc, r - 0.25 * dr, 0.4 * dc, 0.4 * dr, head_width=0.2, alpha=float(probs.max()))
    right.text(CELLS[EXIT][1], CELLS[EXIT][0], "exit", ha="center", va="center")
    right.set(xticks=[], yticks=[], title=f"likeliest action, baseline {options.baseline[-1]}")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "rollouts.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
