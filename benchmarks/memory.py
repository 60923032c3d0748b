"""How much memory does a layer take at its peak? Decides how many draws fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import stochastic_layers as sl
from benchmarks.measure import Row, arguments, write

QUESTION = (
    "Peak of the memory that one sample takes, forward and backward, beyond its params: in bytes, and as a multiple of "
    "that of F.gumbel_softmax(hard=True) for one draw."
)
SHAPE = (512, 32, 64)
DRAWS = [1, 4, 16]
LAYERS = ["straight_through", "reinmax", "reinforce", "leave_one_out", "gumbel_softmax", "straight_through_gumbel"]
LAYERS += ["gumbel_rao", "rebar"]


def peak(work: Callable[[], object], device: str) -> int:
    """Largest number of bytes that ``work`` holds at once."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = largest = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


def step(name: str, draws: int, device: str) -> Callable[[], object]:
    """One sample with a cost that is cheap: a weighted sum of z."""
    batch, latents, categories = SHAPE
    layer = sl.create(name, latent_dim=latents, family="categorical", num_categories=categories, num_samples=draws)
    layer = layer.to(device)
    params = torch.randn(batch, layer.in_features, device=device, requires_grad=True)
    weights = torch.randn(layer.out_features, device=device)

    def work() -> None:
        sample = layer.sample(params)
        torch.autograd.grad(sample.surrogate(sample.z @ weights).sum(), params)

    return work


def main() -> None:
    """Measure and write ``memory.json``."""
    options = arguments(QUESTION, seconds=0)
    logits = torch.randn(SHAPE, device=options.device, requires_grad=True)
    upstream = torch.randn(SHAPE, device=options.device)
    formula = peak(lambda: torch.autograd.grad(F.gumbel_softmax(logits, hard=True), logits, upstream), options.device)
    rows, findings = [], {}
    for draws in DRAWS:
        group = f"{SHAPE}, {draws} draw{'s' if draws > 1 else ''}"
        if draws == 1:
            rows.append(Row(group, "F.gumbel_softmax", "bytes", formula, formula, formula, 1))
        for name in LAYERS:
            if name == "leave_one_out" and draws == 1:
                continue
            held = peak(step(name, draws, options.device), options.device)
            rows.append(Row(group, name, "bytes", held, held, held, 1))
            findings[f"{name}, {draws} draws, of F.gumbel_softmax for one"] = round(held / formula, 2)
            print(f"{group:28s} {name:28s} {held / 2**20:9.1f} MiB {held / formula:7.2f} x", flush=True)
    print(write("memory", QUESTION, rows, device=options.device, findings=findings, folder=options.folder))


if __name__ == "__main__":
    main()
