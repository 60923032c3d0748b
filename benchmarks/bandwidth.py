"""How close does a draw come to what the memory can do? Decides where a kernel of its own is worth writing.

A draw with its gradient reads params and writes z. Later it reads the slope of the cost, reads again what its own slope
depends on, and writes the gradient of params. All between may stay in registers; so may the noise, which is made and
not read, and one index for each row. This is the least that must move, in numbers for each number of z:

* ``straight_through``, ``reinmax``: params, z; slope, params again (of which the probabilities are made), gradient: 5.
* ``gumbel_softmax``: params, z; slope, z again, gradient: 5.
* ``reinforce``: params, z; params again, gradient: 4. There is no slope, only one cost for each example.
* ``gaussian``: 2 for params, z; slope, log-variance again (the noise is made again), 2 for the gradient: 7.
* softmax, as what torch itself reaches: params, z; slope, z again, gradient: 5.

The limit is the time in which a copy moves as many bytes, half of them read and half written, measured by turns with
the draw. It is that of the caches where the tensors fit them. A time is given as a multiple of it: of the layer as it
comes, and of ``torch.compile(fullgraph=True)`` in its default mode, whose compilation is not counted.

The copy has its memory; a draw asks for its own. On a CPU glibc returns every freed tensor of 32 MiB or more to the
system, and the pages of the next one are fetched anew. The smaller of the large shapes stays below that, the larger one
does not. ``THP_MEM_ALLOC_ENABLE=1``, which torch reads at its start, asks for pages of 2 MiB, and there are fewer. ::

    python -m benchmarks.bandwidth --device cuda
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stochastic_layers as sl
from benchmarks.layers import CATEGORICAL, GAUSSIAN
from benchmarks.measure import Row, arguments, compare, write
from benchmarks.peers import Work, usable

QUESTION = (
    "Forward and backward of one draw, eager and compiled: how many times as long does it take as a copy of the bytes "
    "that must move at the least? Softmax shows what torch itself reaches."
)
NUMBERS = {"softmax": 5, "straight_through": 5, "reinforce": 4, "reinmax": 5, "gumbel_softmax": 5, "gaussian": 7}
LARGE: dict[str, list[tuple[int, ...]]] = {
    "cpu": [(1024, 64, 64), (2048, 64, 64), (2048, 1024), (8192, 1024)],
    "cuda": [(2048, 64, 64), (8192, 64, 64), (8192, 1024), (32768, 1024)],
}
LIMIT = "the copy"

Forward = Callable[[Tensor], tuple[Tensor, ...]]


def copy(numbers: int, device: str) -> Work:
    """A copy that reads and writes so many float32 numbers in all, without a new tensor."""
    source = torch.ones(numbers // 2, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def forward(name: str, shape: tuple[int, ...], device: str) -> tuple[Forward, Tensor]:
    """The forward pass of ``name``, and params for it.

    Args:
        name: One of ``NUMBERS``.
        shape: ``(batch, latents, categories)``, or ``(batch, latents)`` for the Gaussian.
        device: Where to.

    Returns:
        A function of params ``[batch, in_features]`` (for softmax, ``shape``). Its first result is z, its last one has
        the gradient.
    """
    if name == "softmax":
        return lambda logits: (logits.softmax(-1),), torch.randn(shape, device=device, requires_grad=True)
    categories = {} if len(shape) == 2 else {"family": "categorical", "num_categories": shape[2]}
    layer = sl.create(name, latent_dim=shape[1], **categories).to(device)
    params = torch.randn(shape[0], layer.in_features, device=device, requires_grad=True)
    cost = torch.randn(1, shape[0], device=device)

    def pathwise(params: Tensor) -> tuple[Tensor, ...]:
        return (layer.sample(params).z,)

    def scored(params: Tensor) -> tuple[Tensor, ...]:
        sample = layer.sample(params)
        return sample.z, sample.surrogate(cost)

    return scored if name == "reinforce" else pathwise, params


def work(function: Forward, params: Tensor, upstream: Tensor) -> Work:
    """Forward and backward; the last result of ``function`` receives ``upstream``."""
    return lambda: torch.autograd.grad(function(params)[-1], params, upstream)


def measure(
    name: str, shape: tuple[int, ...], seconds: float, device: str, unavailable: dict[str, str]
) -> tuple[list[Row], float]:
    """Time one layer at one shape; the second result is the bandwidth of the copy in bytes per second."""
    function, params = forward(name, shape, device)
    results = function(params)
    numbers, upstream = NUMBERS[name] * results[0].numel(), torch.randn_like(results[-1])
    del results
    torch.compiler.reset()  # the compiler gives up on a function that it has compiled for eight other layers

    def compiled() -> Work:
        return work(torch.compile(function, fullgraph=True, dynamic=False), params, upstream)

    group, failed = f"{name} {shape}", dict[str, str]()
    works = {LIMIT: copy(numbers, device), "eager": work(function, params, upstream)}
    works |= usable({"compiled": compiled}, failed)
    unavailable |= {f"{group} {what}": reason for what, reason in failed.items()}
    rows = compare(group, works, reference=LIMIT, seconds=seconds, device=device)
    return rows, 4 * numbers / rows[0].median


def main() -> None:
    """Measure and write ``bandwidth.json``."""
    options = arguments(QUESTION, seconds=3)
    unavailable: dict[str, str] = {}
    rows: list[Row] = []
    findings = {}
    for shape in [*CATEGORICAL, *GAUSSIAN, *LARGE[options.device]]:
        for name in NUMBERS:
            if (name == "gaussian") == (len(shape) == 2):
                new, bandwidth = measure(name, shape, options.seconds, options.device, unavailable)
                rows += new
                findings.setdefault(f"GB/s of the copy at {shape}", round(bandwidth / 1e9, 1))
    for what, reason in unavailable.items():
        print(f"not measured: {what}: {reason}")
    common = {"device": options.device, "unavailable": unavailable, "folder": options.folder}
    print(write("bandwidth", QUESTION, rows, findings=findings, **common))


if __name__ == "__main__":
    main()
