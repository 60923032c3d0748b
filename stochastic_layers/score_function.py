"""Score-function layers: the gradient is the cost times the gradient of the log-probability of the draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stochastic_layers.baselines import as_of_now, create_baseline
from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.registry import register

__all__ = ["Dice", "LeaveOneOutReinforce", "Reinforce"]


@register("reinforce")
class Reinforce(StochasticLayer):
    r"""REINFORCE: the score-function estimator, with a baseline.

    .. math:: \nabla E_q[f(z)] \approx \frac1S \sum_k (f(z_k) - b_k) \nabla \log q(z_k)

    Approximates the gradient of E_q[f] for any f, differentiable or not, discrete or continuous z. Unbiased, because no
    baseline depends on the draw that it is subtracted from. With ``baseline="leave_one_out"`` it is RLOO, also known as
    VarGrad.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"``, ``"permutation"`` or ``"gaussian"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example.
        baseline: ``"none"``, ``"moving_average"``, ``"learned"``, ``"leave_one_out"``, a mapping such as
            ``{"name": "moving_average", "decay": 0.9}``, or a module (see :class:`~stochastic_layers.Baseline`).

    Raises:
        ValueError: Unknown baseline, or ``num_samples < 2`` with ``"leave_one_out"``.

    References:
        Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Ronald J. Williams,
        1992), https://doi.org/10.1007/BF00992696

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("reinforce", latent_dim=3, num_samples=4, baseline="leave_one_out")
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> sample = layer.sample(logits)
        >>> loss = sample.surrogate((sample.z.sum(-1) - 1) ** 2)
        >>> loss.mean().backward()
        >>> sample.z.shape, loss.shape, logits.grad.shape
        (torch.Size([4, 5, 3]), torch.Size([5]), torch.Size([5, 3]))
    """

    families = ("bernoulli", "categorical", "subset", "permutation", "gaussian")
    unbiased = True
    needs = ("cost",)
    independent_draws = True
    reference = (
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992). "
        "https://doi.org/10.1007/BF00992696"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        baseline: str | Mapping[str, Any] | nn.Module | None = "moving_average",
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        self.baseline = create_baseline(baseline, num_samples=num_samples, context_features=self.in_features)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        z, log_density = self.family.sample_with_log_prob(q, self.num_samples)
        context = (params if context is None else context).detach()
        baseline = as_of_now(self.baseline)

        def credit(cost: Tensor) -> Tensor:
            log_prob = sum_rightmost(log_density(), cost.dim())  # [S, *lead]
            advantage = cost.detach()
            if baseline is not None:
                advantage = advantage - baseline(advantage, context)
            term = self._weighted(advantage.detach(), cost, log_prob)
            if advantage.requires_grad:  # a learned baseline is fitted to the cost by least squares
                term = term + advantage.square()
            return term.mean(0)

        return self._sample(q, z, credit=credit, log_density=log_density)

    def _weighted(self, advantage: Tensor, cost: Tensor, log_prob: Tensor) -> Tensor:
        """The term ``[S, *lead]`` that carries the credit of each draw."""
        return advantage * log_prob


@register("dice")
class Dice(Reinforce):
    r"""DiCE: the score-function estimator whose surrogate may be differentiated any number of times.

    .. math:: \square = \exp(\log q(z) - \mathrm{stop}(\log q(z))), \qquad
        \nabla^n E_q[f] \approx \nabla^n \, \frac1S \sum_k \big(\square_k f(z_k) + (1 - \square_k) b_k\big)

    Approximates derivatives of every order of E_q[f], mixed ones of encoder and decoder among them, for any f;
    unbiased at every order. Its first gradient is that of ``reinforce`` with the same baseline, whose second
    derivatives miss terms. For meta-learning, opponent shaping, Hessians; where one gradient is all, use
    ``reinforce``. The baseline lowers the variance of the first derivative most.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"``, ``"permutation"`` or ``"gaussian"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example.
        baseline: See :class:`Reinforce`.

    Raises:
        ValueError: Unknown baseline, or ``num_samples < 2`` with ``"leave_one_out"``.

    References:
        DiCE: The Infinitely Differentiable Monte-Carlo Estimator (Jakob Foerster, Gregory Farquhar, Maruan
        Al-Shedivat, Tim Rocktäschel, Eric P. Xing, Shimon Whiteson, 2018), https://arxiv.org/abs/1802.05098

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer, logits = sl.create("dice", latent_dim=3), torch.zeros(5, 3, requires_grad=True)
        >>> sample = layer.sample(logits)
        >>> loss = sample.surrogate(sample.z.sum(-1) ** 2).mean()
        >>> (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        >>> torch.autograd.grad(gradient.square().sum(), logits)[0].shape
        torch.Size([5, 3])
    """

    reference = (
        "DiCE: The Infinitely Differentiable Monte-Carlo Estimator (Foerster, Farquhar, Al-Shedivat, Rocktäschel, Xing "
        "and Whiteson, 2018). https://arxiv.org/abs/1802.05098"
    )

    def _weighted(self, advantage: Tensor, cost: Tensor, log_prob: Tensor) -> Tensor:
        # the surrogate holds the cost itself already: the box less 1 is zero and has every derivative of the box
        return (log_prob - log_prob.detach()).expm1() * (cost - (cost.detach() - advantage))


@register("leave_one_out")
class LeaveOneOutReinforce(Reinforce):
    r"""Leave-one-out REINFORCE, known as RLOO and as VarGrad: each draw's baseline is the mean cost of the others.

    .. math:: \nabla E_q[f(z)] \approx \frac1{S-1} \sum_k (f(z_k) - \bar f) \nabla \log q(z_k)

    Approximates the gradient of E_q[f] for any f. Unbiased. The preset ``reinforce`` with
    ``baseline="leave_one_out"``; a constant cost gives a zero gradient.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"``, ``"permutation"`` or ``"gaussian"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example, at least 2.

    Raises:
        ValueError: ``num_samples < 2``.

    References:
        Buy 4 REINFORCE Samples, Get a Baseline for Free! (Wouter Kool, Herke van Hoof, Max Welling, 2019),
        https://openreview.net/forum?id=r1lgTGL5DE

    Example:
        >>> import torch, stochastic_layers as sl
        >>> sl.create("leave_one_out", latent_dim=3).sample(torch.zeros(5, 3)).z.shape
        torch.Size([2, 5, 3])
    """

    reference = (
        "Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool, van Hoof and Welling, 2019). "
        "https://openreview.net/forum?id=r1lgTGL5DE"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 2,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            baseline="leave_one_out",
        )
