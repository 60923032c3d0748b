"""Baselines: what the cost of a draw is compared with, to lower the variance of score-function layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stochastic_layers.auxiliary import eager_on_cpu
from stochastic_layers.options import check_positive_int, require_two
from stochastic_layers.recomputation import refuse_recomputation
from stochastic_layers.registry import nearest
from stochastic_layers.running_state import RunningState

__all__ = ["Baseline", "LearnedBaseline", "LeaveOneOut", "MovingAverage", "RunningMean", "as_of_now", "create_baseline"]

Prediction = Callable[[Tensor, Tensor], Tensor]


class Baseline(nn.Module, ABC):
    """Base of baselines; any ``nn.Module`` with the same :meth:`forward` will do.

    A baseline must not depend on the draw that it is subtracted from: its value for draw k may use the context and the
    other draws, or earlier steps. Then it changes the variance of the estimator and not its mean. Where the returned
    prediction carries a gradient, the layer fits it to the cost by least squares, inside the same backward pass.
    """

    min_samples: int = 1

    @abstractmethod
    def forward(self, cost: Tensor, context: Tensor) -> Tensor:
        """The prediction of the cost.

        Args:
            cost: ``[S, *leading batch]``, detached.
            context: ``[*batch, F]``, detached: what the user passed to ``layer.sample``, else the layer's params.

        Returns:
            A tensor that broadcasts to the shape of the cost.
        """

    def as_of_now(self) -> Prediction:
        """:meth:`forward` for a sample that is drawn now, whose cost comes later.

        In between, that very cost may be seen: the layer is called twice in one model, or ``surrogate`` twice. A
        baseline that learns in ``forward`` overrides this, and predicts by what it knows when it is called.
        """
        return self


class LeaveOneOut(Baseline):
    """The mean cost of the other draws; needs at least two draws per example.

    References:
        Buy 4 REINFORCE Samples, Get a Baseline for Free! (Wouter Kool, Herke van Hoof, Max Welling, 2019),
        https://openreview.net/forum?id=r1lgTGL5DE
    """

    min_samples = 2

    def forward(self, cost: Tensor, context: Tensor) -> Tensor:
        require_two(cost.shape[0])  # the layer's attribute may have been set since it was checked
        first = cost[:1]
        rest = cost - first  # so that the baseline of a constant cost is that cost exactly, whatever its rounding
        return first + (rest.sum(0, keepdim=True) - rest) / (cost.shape[0] - 1)


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of a shape can be expanded to another."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


def mean_over_all_ranks(rows: Tensor) -> tuple[Tensor, Tensor | int]:
    """Mean ``[n]`` of the rows ``[N, n]`` of all ranks of ``torch.distributed``, and their number (or ``[1]``).

    Every row counts the same, whatever rank has it; the mean of no rows is 0. Both are without gradient.
    """
    total, count = rows.detach().sum(0), rows.shape[0]
    if not (dist.is_available() and dist.is_initialized()):
        return total / max(count, 1), count
    moments = torch.cat([total, rows.new_full((1,), count)])
    dist.all_reduce(moments)
    return moments[:-1] / moments[-1:].clamp_min(1), moments[-1:]


class RunningMean(RunningState):
    """A running mean of some statistics over steps, agreed by all ranks.

    The mean is a weighted sum over past steps divided by the sum of the weights, so that it has no start-up bias. Under
    ``torch.distributed`` the statistics are summed over all ranks before the update, and the ranks agree. A step with
    NaN or an infinite value on any rank is seen in its loss and gradient, and is not counted.

    Args:
        decay: Weight of the past at each step, in [0, 1).
        size: Number n of statistics.

    Raises:
        ValueError: ``decay`` is out of range.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99, size: int = 1) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"needed 0 <= decay < 1, got {decay}.")
        self.decay = decay
        self.register_buffer("total", torch.zeros(size))
        self.register_buffer("weight", torch.zeros(1))

    @property
    def value(self) -> Tensor:
        """The mean ``[n]``; 0 before the first step."""
        weight = self.weight
        return self.total / weight.clamp_min(torch.finfo(weight.dtype).tiny)

    def update(self, values: Tensor) -> None:
        """Count one step of ``values`` ``[*any, n]``; evaluation mode and ``no_grad`` probes do not come here."""
        self.accumulate(*mean_over_all_ranks(values.reshape(-1, self.total.shape[0])))

    def accumulate(self, mean: Tensor, count: Tensor | int) -> None:
        """Count one step of which all ranks know the mean ``[n]``, without gradient, and the number of rows already."""
        refuse_recomputation("a running mean")
        total, weight = self.total, self.weight
        # an empty batch changes nothing
        rate = (1 - self.decay) * (count.to(total.dtype).clamp_max(1) if isinstance(count, Tensor) else min(count, 1))
        mean, ones = mean.to(total.dtype), torch.ones_like(weight)
        # what is not finite would stay for ever
        if eager_on_cpu(mean):
            if not math.isfinite(mean.sum()):
                return
        else:  # a tensor decides: nothing waits for a GPU
            finite = torch.isfinite(mean).all()
            mean, rate = torch.where(finite, mean, 0.0), rate * finite.to(total.dtype)
        total.lerp_(mean, rate)
        weight.lerp_(ones, rate)

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


class MovingAverage(RunningMean, Baseline):
    """A running mean of the cost over steps, as it stood before the current step (see :class:`RunningMean`).

    Args:
        decay: Weight of the past at each step, in [0, 1).

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__(decay)

    def as_of_now(self) -> Prediction:
        baseline = self.value

        def predict(cost: Tensor, context: Tensor) -> Tensor:
            if self.training and torch.is_grad_enabled():
                self.update(cost)
            return baseline

        return predict

    def forward(self, cost: Tensor, context: Tensor) -> Tensor:
        return self.as_of_now()(cost, context)


class LearnedBaseline(Baseline):
    """A small network that predicts the cost from the context.

    Args:
        context_features: Size F of the context's last dimension. The layer passes its params where the user gives no
            context, so that ``layer.in_features`` is right there.
        hidden_features: Width of the hidden layer.

    Raises:
        ValueError: A size is not positive; in :meth:`forward`, a context of another size or batch.

    References:
        Neural Variational Inference and Learning in Belief Networks (Andriy Mnih, Karol Gregor, 2014),
        https://arxiv.org/abs/1402.0030
    """

    def __init__(self, context_features: int, hidden_features: int = 100) -> None:
        super().__init__()
        self.context_features = check_positive_int("context_features", context_features)
        check_positive_int("hidden_features", hidden_features)
        self.network = nn.Sequential(
            nn.Linear(context_features, hidden_features), nn.Tanh(), nn.Linear(hidden_features, 1)
        )

    def forward(self, cost: Tensor, context: Tensor) -> Tensor:
        if context.shape[-1] != self.context_features:
            raise ValueError(
                f"needed a context [*batch, {self.context_features}], got {list(context.shape)}; build the layer with "
                f"baseline={{'name': 'learned', 'context_features': {context.shape[-1]}}}."
            )
        dtype = next(self.network.parameters()).dtype
        prediction: Tensor = self.network(context.to(dtype)).squeeze(-1)  # [*batch]
        # a cost that has summed trailing batch dimensions is predicted by the sum of their predictions
        if prediction.dim() >= cost.dim():
            prediction = prediction.flatten(cost.dim() - 1).sum(-1)
        if not broadcasts(prediction.shape, cost.shape[1:]):
            raise ValueError(
                f"needed a context [*batch, {self.context_features}] for a cost of shape {list(cost.shape)}, got "
                f"{list(context.shape)}; give every example its features."
            )
        return prediction


def as_of_now(baseline: nn.Module | None) -> Prediction | None:
    """What a sample that is drawn now is to be compared with; a module of another kind is called as it is.

    Raises:
        ValueError: From the prediction: its shape would compare examples with each other's predictions.
    """
    if baseline is None:
        return None
    predict: Prediction = baseline.as_of_now() if isinstance(baseline, Baseline) else baseline

    def checked(cost: Tensor, context: Tensor) -> Tensor:
        prediction = predict(cost, context)
        if not broadcasts(prediction.shape, cost.shape):
            raise ValueError(
                f"needed a prediction that broadcasts to the cost {list(cost.shape)}, got {list(prediction.shape)} "
                f"from the baseline {type(baseline).__name__}; return one value for each example, by .squeeze(-1) say."
            )
        return prediction

    return checked


_BASELINES: dict[str, type[Baseline] | None] = {
    "none": None,
    "moving_average": MovingAverage,
    "learned": LearnedBaseline,
    "leave_one_out": LeaveOneOut,
}


def create_baseline(
    baseline: str | Mapping[str, Any] | nn.Module | None, *, num_samples: int, context_features: int
) -> nn.Module | None:
    """The baseline module of a name, of a mapping ``{"name": ..., **options}``, or a module as it is.

    Args:
        baseline: ``"none"``, ``"moving_average"``, ``"learned"``, ``"leave_one_out"``, a mapping, a module or ``None``.
        num_samples: Draws per example of the layer.
        context_features: Default context size of a learned baseline.

    Raises:
        ValueError: Unknown name or option, or too few draws for the baseline.
    """
    if baseline is None or isinstance(baseline, nn.Module):
        module = baseline
    elif not isinstance(baseline, (str, Mapping)):
        raise ValueError(
            f"needed the name of a baseline, a mapping or a module, got {baseline!r}; "
            f"{nearest(str(baseline), _BASELINES)}"
        )
    else:
        options: dict[str, Any] = {"name": baseline} if isinstance(baseline, str) else dict(baseline)
        name = options.pop("name", None)
        if name not in _BASELINES:
            raise ValueError(
                f"needed the name of a baseline or a module, got {name!r}; {nearest(str(name), _BASELINES)}"
            )
        cls = _BASELINES[name]
        if cls is LearnedBaseline:
            options.setdefault("context_features", context_features)
        try:
            module = cls(**options) if cls is not None else None
        except TypeError as error:
            raise ValueError(f"needed options of baseline {name!r}, got {sorted(options)}: {error}.") from error
    needed = getattr(module, "min_samples", 1)
    if num_samples < needed:
        raise ValueError(
            f"needed num_samples >= {needed} for baseline {type(module).__name__}, got {num_samples}: it compares each "
            "draw with the others. Raise num_samples, or use 'reinforce' with baseline='moving_average'."
        )
    return module
