"""How fast is a draw with its gradient, layer by layer? Decides whether a layer may stand where a formula stood."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import kl_divergence

import stochastic_layers as sl
from benchmarks import peers
from benchmarks.measure import Row, arguments, compare, write
from benchmarks.peers import Work

QUESTION = "Forward and backward of one draw by each library: how long does it take, against torch's own formula?"
CATEGORICAL = [(512, 32, 64), (256, 1, 1024), (128, 20, 10)]
GAUSSIAN = [(128, 20), (128, 200), (512, 256)]
BITS = [(128, 200)]
SUBSETS = [((128, 16), 2), ((256, 64), 4), ((256, 1024), 8)]
ORDERS = [(128, 8), (256, 32), (64, 128)]


def _layer(name: str, params: Tensor, upstream: Tensor, **options: object) -> Callable[[], Work]:
    def build() -> Work:
        layer = sl.create(name, **options).to(params.device)
        return lambda: torch.autograd.grad(layer(params), params, upstream)

    return build


def _scored(name: str, params: Tensor, cost: Tensor, **options: object) -> Callable[[], Work]:
    def build() -> Work:
        layer = sl.create(name, **options).to(params.device)
        return lambda: torch.autograd.grad(layer.sample(params).surrogate(cost.unsqueeze(0)).sum(), params)

    return build


def categorical(shape: tuple[int, int, int], seconds: float, device: str, unavailable: dict[str, str]) -> list[Row]:
    """Hard and soft draws of one-hot variables, ``shape = (batch, latents, categories)``."""
    batch, latents, categories = shape
    logits = torch.randn(shape, device=device, requires_grad=True)
    upstream, cost = torch.randn(shape, device=device), torch.randn(batch, device=device)
    params = logits.detach().flatten(1).requires_grad_()
    slope = upstream.flatten(1)
    of = {"latent_dim": latents, "family": "categorical", "num_categories": categories}

    def formula(hard: bool) -> Work:
        return lambda: torch.autograd.grad(F.gumbel_softmax(logits, hard=hard), logits, upstream)

    others = peers.categorical(logits, upstream, cost)
    cases = {
        "hard": {
            "F.gumbel_softmax": lambda: formula(True),
            "straight_through": _layer("straight_through", params, slope, **of),
            "reinforce": _scored("reinforce", params, cost, **of),
            "reinmax": _layer("reinmax", params, slope, **of),
            "straight_through_gumbel": _layer("straight_through_gumbel", params, slope, **of),
            **others["hard"],
        },
        "soft": {
            "F.gumbel_softmax": lambda: formula(False),
            "gumbel_softmax": _layer("gumbel_softmax", params, slope, **of),
            **others["soft"],
        },
    }
    rows = []
    for kind, builders in cases.items():
        works = peers.usable(builders, unavailable)
        group = f"{kind} categorical {shape}"
        rows += compare(group, works, reference="F.gumbel_softmax", seconds=seconds, device=device)
    return rows


def gaussian(shape: tuple[int, int], seconds: float, device: str, unavailable: dict[str, str]) -> list[Row]:
    """A pathwise draw with its KL to the standard normal, ``shape = (batch, latents)``."""
    batch, latents = shape
    params = torch.randn(batch, 2 * latents, device=device, requires_grad=True)
    upstream = torch.randn(batch, latents, device=device)

    def formula() -> None:
        loc, log_variance = params.chunk(2, -1)
        z = loc + (0.5 * log_variance).exp() * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        torch.autograd.grad((z * upstream).sum() + kl.sum(), params)

    def ours() -> Work:
        layer = sl.create("gaussian", latent_dim=latents)
        with torch.device(device):
            prior = layer.family.standard()

        def work() -> None:
            sample = layer.sample(params)
            loss = (sample.z * upstream).sum() + kl_divergence(sample.q, prior).sum()
            torch.autograd.grad(loss, params)

        return work

    works = peers.usable(
        {"by hand": lambda: formula, "gaussian": ours, **peers.gaussian(params, upstream)}, unavailable
    )
    return compare(f"gaussian with KL {shape}", works, reference="by hand", seconds=seconds, device=device)


def bits(shape: tuple[int, int], seconds: float, device: str, unavailable: dict[str, str]) -> list[Row]:
    """Bits, ``shape = (batch, latents)``."""
    logits = torch.randn(shape, device=device, requires_grad=True)
    upstream, cost = torch.randn(shape, device=device), torch.randn(shape[0], device=device)
    of = {"latent_dim": shape[1], "family": "bernoulli"}

    def formula() -> None:
        probs = logits.sigmoid()
        z = torch.bernoulli(probs) + (probs - probs.detach())
        torch.autograd.grad(z, logits, upstream)

    works = peers.usable(
        {
            "by hand": lambda: formula,
            "straight_through": _layer("straight_through", logits, upstream, **of),
            "reinforce": _scored("reinforce", logits, cost, **of),
            "reinmax": _layer("reinmax", logits, upstream, **of),
            "gumbel_softmax": _layer("gumbel_softmax", logits, upstream, **of),
        },
        unavailable,
    )
    return compare(f"bits {shape}", works, reference="by hand", seconds=seconds, device=device)


def subsets(shape: tuple[int, int], size: int, seconds: float, device: str, unavailable: dict[str, str]) -> list[Row]:
    """Choices of ``size`` of the items, ``shape = (batch, items)``, beside a straight-through draw of another law."""
    logits = torch.randn(shape, device=device, requires_grad=True)
    upstream, cost = torch.randn(shape, device=device), torch.randn(shape[0], device=device)
    of = {"latent_dim": 1, "num_categories": shape[1], "family": {"name": "subset", "size": size}}

    def largest() -> None:
        scores = logits - torch.empty_like(logits).exponential_().log()
        soft = scores.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, scores.topk(size, -1).indices, 1.0)
        torch.autograd.grad(hard + (soft - soft.detach()), logits, upstream)

    works = peers.usable(
        {
            "Gumbel top-k by hand": lambda: largest,
            "straight_through": _layer("straight_through", logits, upstream, **of),
            "reinforce": _scored("reinforce", logits, cost, **of),
        },
        unavailable,
    )
    group = f"{size} of {shape[1]}, batch {shape[0]}"
    return compare(group, works, reference="Gumbel top-k by hand", seconds=seconds, device=device)


def orders(shape: tuple[int, int], seconds: float, device: str, unavailable: dict[str, str]) -> list[Row]:
    """Orders of items, ``shape = (batch, items)``, by values of the cost and through relaxed matrices."""
    logits = torch.randn(shape, device=device, requires_grad=True)
    slope, cost = torch.randn(*shape, shape[1], device=device), torch.randn(shape[0], device=device)
    of = {"latent_dim": 1, "num_categories": shape[1], "family": "permutation"}

    def perturbed() -> tuple[Tensor, Tensor]:
        scores = logits - torch.empty_like(logits).exponential_().log()
        return scores, scores.detach().argsort(-1, descending=True)

    def scored() -> None:
        order = perturbed()[1]
        F.one_hot(order, shape[1]).to(logits.dtype)  # the draw, of which only the cost is known
        chosen = logits.gather(-1, order)
        log_q = (chosen - chosen.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)
        torch.autograd.grad((log_q * cost).sum(), logits)

    def relaxed() -> None:
        scores, order = perturbed()
        z = (scores.gather(-1, order).unsqueeze(-1) - scores.unsqueeze(-2)).abs().neg().softmax(-1)
        torch.autograd.grad(z, logits, slope)

    cases = {
        "score function": {"by hand": lambda: scored, "reinforce": _scored("reinforce", logits, cost, **of)},
        "relaxed": {"by hand": lambda: relaxed, "soft_sort": _layer("soft_sort", logits, slope.flatten(1), **of)},
    }
    rows = []
    for kind, builders in cases.items():
        works = peers.usable(builders, unavailable)
        group = f"orders of {shape[1]}, batch {shape[0]}, {kind}"
        rows += compare(group, works, reference="by hand", seconds=seconds, device=device)
    return rows


def quantised(seconds: float, device: str, unavailable: dict[str, str]) -> list[Row]:
    """Codes for 64 vectors of 32 dimensions in a batch of 64, and scalar codes of four coordinates."""
    x = torch.randn(64, 64, 32, device=device, requires_grad=True)
    levels = [8, 5, 5, 5]
    rows = []
    for kind, other in peers.quantised(x, levels, 512).items():
        inputs = (x if kind == "vq" else x[..., : len(levels)]).detach().flatten(1).requires_grad_()
        options = {"levels": levels} if kind == "fsq" else {"num_codes": 512, "code_dim": 32}
        builders = {kind: _quantiser(kind, inputs, latent_dim=64, **options)}
        works = peers.usable({**builders, **{f"{name} {kind}": build for name, build in other.items()}}, unavailable)
        group = f"{kind} (64, 64, {inputs.shape[1] // 64})"
        rows += compare(group, works, reference=kind, seconds=seconds, device=device)
    return rows


def _quantiser(name: str, inputs: Tensor, **options: object) -> Callable[[], Work]:
    def build() -> Work:
        layer = sl.create(name, **options).to(inputs.device)
        return lambda: torch.autograd.grad(layer(inputs).sum(), inputs)  # outside capture() the commitment is added

    return build


def main() -> None:
    """Measure and write ``layers.json``."""
    options = arguments(QUESTION, seconds=10)
    unavailable: dict[str, str] = {}
    rows: list[Row] = []
    for shape in CATEGORICAL:
        rows += categorical(shape, options.seconds, options.device, unavailable)
    for size in GAUSSIAN:
        rows += gaussian(size, options.seconds, options.device, unavailable)
    for size in BITS:
        rows += bits(size, options.seconds, options.device, unavailable)
    for shape, size in SUBSETS:
        rows += subsets(shape, size, options.seconds, options.device, unavailable)
    for size in ORDERS:
        rows += orders(size, options.seconds, options.device, unavailable)
    rows += quantised(options.seconds, options.device, unavailable)
    for name, reason in unavailable.items():
        print(f"not measured: {name}: {reason}")
    print(write("layers", QUESTION, rows, device=options.device, unavailable=unavailable, folder=options.folder))


if __name__ == "__main__":
    main()
