"""Checks of what a layer states: what it needs of the cost, and that its gradient goes nowhere else."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from stochastic_layers.captures import capture
from stochastic_layers.layer import StochasticLayer
from stochastic_layers.surrogate import surrogate
from stochastic_layers.testing.contract import expect
from stochastic_layers.testing.exact import PolynomialCost
from stochastic_layers.testing.subject import NotApplicable, Subject, close, step

__all__ = [
    "black_box_cost",
    "compiled_step",
    "constant_cost",
    "decoder_gradient",
    "inside_capture",
    "outside_capture",
    "own_parameters",
    "shifted_cost",
    "summed_batch",
]

DRAWS = 64  # enough for a gradient that is not zero by chance


def black_box_cost(subject: Subject) -> str:
    """Without ``cost_gradient`` in needs: values of the cost alone give the very same gradient."""
    if "cost_gradient" in subject.build().needs:
        raise NotApplicable("the layer states cost_gradient")
    params = subject.params(DRAWS)
    attached, black = subject.step(params), subject.step(params, black_box=True)
    expect(black.encoder.any(), "the gradient is zero when the cost is a black box; state needs 'cost_gradient'")
    expect(
        close(attached.encoder, black.encoder),
        "the gradient changes when the cost is a black box; state needs 'cost_gradient'",
    )
    return "the same gradient without autograd through z"


def shifted_cost(subject: Subject) -> str:
    """Without ``cost`` in needs: a constant added to the cost changes no gradient."""
    if "cost" in subject.build().needs:
        raise NotApplicable("the layer states cost")
    params = subject.params(DRAWS)
    plain, shifted = subject.step(params), subject.step(params, shift=100.0)
    expect(
        close(plain.encoder, shifted.encoder),
        "a constant added to the cost changes the gradient, so that values of the cost are used; state needs 'cost'",
    )
    return "the same gradient for cost + 100"


def outside_capture(subject: Subject) -> str:
    """forward() in training refuses to run outside capture() if and only if the layer needs the cost."""
    layer, params = subject.build(), subject.params(DRAWS).requires_grad_()
    needs_cost = "cost" in layer.needs
    try:
        z = layer(params)
        raised = False
    except RuntimeError as error:
        raised = True
        expect("capture" in str(error), f"the error outside capture() does not say what to do: {error}")
    expect(
        raised == needs_cost,
        f"forward() outside capture() {'raised' if raised else 'did not raise'}, with needs = {layer.needs}",
    )
    if not raised:
        cost = subject.cost()(z)
        expect(cost.requires_grad, "outside capture() no gradient reaches params, and no error was raised")
        (gradient,) = torch.autograd.grad(cost.sum(), params, allow_unused=True)
        expect(
            gradient is not None and gradient.any(), "outside capture() the gradient is zero, and no error was raised"
        )
    with torch.no_grad():
        layer(params)
    layer.eval()(params)
    return "refused" if raised else "trains"


def inside_capture(subject: Subject) -> str:
    """forward() inside capture() and ``sl.surrogate`` give the loss and gradient of sample() and surrogate()."""
    params, cost = subject.params(5), subject.cost()
    reference = subject.step(params)
    leaf = params.clone().requires_grad_()
    layer = subject.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        with capture() as samples:
            z = layer(leaf)
        expect(len(samples) == 1, f"capture() collected {len(samples)} samples of one call")
        loss = surrogate(cost(z), samples)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    expect(close(loss.detach(), reference.loss.detach()), "the captured loss differs from that of sample()")
    expect(close(gradient, reference.encoder), "the captured gradient differs from that of sample()")
    return "the same loss and gradient"


def constant_cost(subject: Subject) -> str:
    """The gradient of a constant cost: reported whether it is exactly zero (its mean is tested with the others)."""
    run = subject.step(subject.params(DRAWS), kind="constant")
    size = float(run.encoder.abs().max())
    expect(torch.isfinite(run.encoder).all(), "the gradient of a constant cost is not finite")
    return "exactly zero gradient" if size < 1e-12 else f"gradient up to {size:.2g}"


def decoder_gradient(subject: Subject) -> str:
    """The decoder's gradient is that of ``(weights * cost).sum(0)`` and of nothing else."""
    for kind in ("quadratic", "asymmetric"):
        params, cost = subject.params(4), subject.cost(kind)
        run = step(subject.build(), params, cost, seed=subject.seed)
        weights = run.sample.weights.detach()
        weights = weights.view(*weights.shape, *[1] * (2 - weights.dim()))
        (needed,) = torch.autograd.grad((weights * cost(run.sample.z.detach())).sum(), next(cost.parameters()))
        expect(
            close(run.decoder, needed), f"the decoder's gradient of the {kind} cost is not that of the weighted cost"
        )
    return "quadratic, asymmetric"


def own_parameters(subject: Subject) -> str:
    """The layer's own parameters get a gradient or none, and freezing them changes no other gradient."""
    free, frozen = subject.build(), subject.build()
    if not list(free.parameters()):
        raise NotApplicable("the layer has no parameters of its own")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    params, cost = subject.params(DRAWS), subject.cost()
    for layer in (free, frozen):  # some learn only from the second step on
        step(layer, params, cost, seed=1)
    a, b = step(free, params, cost), step(frozen, params, cost)
    expect(close(a.encoder, b.encoder), "the encoder's gradient depends on whether the layer's own parameters train")
    expect(close(a.decoder, b.decoder), "the decoder's gradient depends on whether the layer's own parameters train")
    expect(all(p.dim() >= 1 for p in free.parameters()), "a parameter has no dimension; give it the shape (1,)")
    return f"{sum(p.numel() for p in free.parameters())} parameters"


class SummedCost(PolynomialCost):
    """A polynomial cost of z ``[..., T, features]`` that has summed T."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).sum(-1)


def summed_batch(subject: Subject) -> str:
    """A cost that has summed the last batch dimension is refused by a ValueError, or its loss and gradient are right.

    Right means here: of the shape and value that it should have, and equal in gradient to the unsummed cost where the
    layer needs no values of the cost. The mean of the others is tested with the gradients.
    """
    params = subject.params(3, 4)
    cost = SummedCost("asymmetric", subject.build().out_features)
    try:
        summed = step(subject.build(), params, cost, seed=subject.seed)
    except ValueError as error:
        return f"refused: {error}"
    expect(
        list(summed.loss.shape) == [3], f"surrogate() is {list(summed.loss.shape)} for a cost [S, 3] of z [S, 3, 4, F]"
    )
    whole = subject.step(params)
    expect(summed.sample.weights.dim() == 1, "weights [S, *batch] cannot weight a summed cost; refuse it")
    weighted = (summed.sample.weights.view(-1, 1) * summed.cost).sum(0)
    expect(close(summed.loss.detach(), weighted.detach()), "surrogate() of a summed cost is not the weighted cost")
    expect(close(summed.decoder, whole.decoder), "the decoder's gradient of a summed cost is not the sum")
    if "cost" not in subject.build().needs:
        expect(close(summed.encoder, whole.encoder), "the gradient of a summed cost is not that of its terms")
    return "right"


def compiled_step(subject: Subject) -> str:
    """Sample, cost and surrogate compile into one graph, whose gradients are finite."""
    if subject.cls.__module__ not in sys.modules:
        raise NotApplicable("the layer's class was defined outside any module, where the compiler cannot follow")
    if not subject.cls.fullgraph:
        raise NotApplicable("the layer states that it does not compile into one graph")
    layer, params = subject.build(torch.float32), subject.params(6, dtype=torch.float32)
    cost = subject.cost().float()
    try:
        run_compiled(layer, cost, params, subject.backend)
        return subject.backend
    except AssertionError:
        raise
    except Exception as error:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise AssertionError(f"does not compile into one graph: {_first_line(error)}") from error
    try:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            run_compiled(subject.build(torch.float32), cost, params, subject.backend)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"does not compile into one graph: {_first_line(error)}") from error
    return f"{subject.backend}, with torch._dynamo.config.trace_autograd_ops = True"


def run_compiled(layer: StochasticLayer, cost: PolynomialCost, params: Tensor, backend: str) -> None:
    """Compile a training step and run it twice."""

    def loss_of(params: Tensor) -> tuple[Tensor, Tensor]:
        sample = layer.sample(params)
        value = cost(sample.z)
        weights = sample.weights.view(*sample.weights.shape, *[1] * (2 - sample.weights.dim()))
        return sample.surrogate(value), (weights * value).sum(0)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
        for _ in range(2):
            leaf = params.clone().requires_grad_()
            loss, value = compiled(leaf)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            expect(torch.isfinite(gradient).all(), "the gradient of the compiled step is not finite")
            expect(torch.allclose(loss, value), "the compiled surrogate() is not (weights * cost).sum(0)")
    torch._dynamo.reset()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
