"""Objectives of several draws per example: the importance-weighted bound and its gradients, and its relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_modules.objectives import Objective, Terms
from stochastic_layers import StochasticLayer

__all__ = ["IWAE", "RWS", "TVO", "Renyi"]

Control = Literal["geometric", "arithmetic"]


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"needed {option} in {choices}, got {value!r}.")


def _check_pathwise(what: str, layer: StochasticLayer, instead: str) -> None:
    if layer.needs != ("cost_gradient",) or layer.unbiased is not True or not layer.exact_draws:
        raise ValueError(
            f"needed a pathwise layer for {what}, got {layer.name!r}: the gradient must flow through exact draws. Use "
            f"layer='gaussian', or {instead}."
        )


def _check_independent(what: str, layer: StochasticLayer, num_samples: int) -> None:
    if not (layer.exact_draws and layer.independent_draws):
        raise ValueError(
            f"needed a layer whose draws are exact, independent and equally weighted for {what}, got {layer.name!r}; "
            "the objective replaces the layer's estimator by its own, so use layer='reinforce' (or 'gaussian') with "
            "num_samples=K."
        )
    if layer.num_samples < num_samples:
        raise ValueError(
            f"needed num_samples >= {num_samples} for {what}, got {layer.num_samples}: each draw is compared with the "
            "others. Set layer_options={'num_samples': 8}, say, or use objective='elbo'."
        )


def _others(log_weights: Tensor) -> Tensor:
    """log sum_{j != k} w_j for every k: ``[K, B]`` -> ``[K, B]``, without cancellation."""
    eye = torch.eye(log_weights.shape[0], dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    return log_weights.unsqueeze(0).masked_fill(eye, -math.inf).logsumexp(1)


def _control(log_weights: Tensor, control: Control) -> Tensor:
    """The bound with draw k replaced by a mean of the others, so that it does not depend on it: ``[K, B]``."""
    k = log_weights.shape[0]
    if control == "arithmetic":
        return _others(log_weights) - math.log(k - 1)
    mean_of_others = (log_weights.sum(0) - log_weights) / (k - 1)
    return torch.logaddexp(_others(log_weights), mean_of_others) - math.log(k)


def _value_and_gradient_of(value: Tensor, *credits: Tensor) -> Tensor:
    """``value``, with the gradients of the credits added to its own."""
    for credit in credits:
        value = value + (credit - credit.detach())
    return value


class _MultiSample(Objective):
    needs_log_weights = True


@dataclass(frozen=True)
class IWAE(_MultiSample):
    r"""The importance-weighted bound, with a choice of gradient; K is the layer's ``num_samples``.

    .. math:: L_K = E \log \frac1K \sum_k w_k, \quad w_k = p(x, z_k) / q(z_k), \quad v_k = w_k / \textstyle\sum_j w_j

    A lower bound of log p(x) that rises with K. All gradients but ``stl`` (K = 1 only) estimate that of the same bound
    without bias; they differ in variance and in the layers they take. With respect to the params of q (s_k is the score
    of draw k, d z_k the derivative through its reparameterization):

    - ``pathwise``: :math:`\sum_k v_k \, d \log w_k`. Pathwise layers. Its signal-to-noise ratio falls with K.
    - ``stl``: the same at K = 1 without the score of q: zero variance where q is the posterior. Above K = 1 it would
      estimate another gradient and is refused.
    - ``dreg``: :math:`\sum_k v_k^2 \, \partial_z \log w_k \, d z_k`. Pathwise layers with independent draws; one
      additional backward pass through the decoder down to z. A learned prior is fine: its own params keep the gradient
      of the bound. A prior that is conditional on other draws (a hierarchy) would need generalised DReG.
    - ``vimco``: :math:`\sum_k (L - \hat L_{-k} - v_k) \, s_k`, with draw k replaced by the mean of the others in
      :math:`\hat L_{-k}`. Any layer with exact, independent, equally weighted draws: the rule replaces the layer's own.
    - ``ovis``: the same with :math:`\hat L_{-k} = \log \frac1K \sum_{j \neq k} w_j`, which is asymptotically optimal in
      K: the coefficient becomes :math:`-v_k - \log(1 - v_k) \geq 0`. (OVIS with gamma = 0, the unbiased one.)

    Args:
        gradient: ``"pathwise"``, ``"stl"``, ``"dreg"``, ``"vimco"`` or ``"ovis"``.
        control: Mean of the other weights in VIMCO: ``"geometric"`` or ``"arithmetic"``.

    Raises:
        ValueError: Another gradient or control.

    References:
        Importance Weighted Autoencoders (Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2015),
        https://arxiv.org/abs/1509.00519; Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
        Variational Inference (Geoffrey Roeder, Yuhuai Wu, David Duvenaud, 2017), https://arxiv.org/abs/1703.09194;
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (George Tucker, Dieterich Lawson, Shixiang
        Gu, Chris J. Maddison, 2018), https://arxiv.org/abs/1810.04152; Variational Inference for Monte Carlo Objectives
        (Andriy Mnih, Danilo J. Rezende, 2016), https://arxiv.org/abs/1602.06725; Optimal Variance Control of the
        Score-Function Gradient Estimator for Importance-Weighted Bounds (Valentin Lievin, Andrea Dittadi, Anders
        Christensen, Ole Winther, 2020), https://arxiv.org/abs/2008.01998

    Example:
        >>> from lightning_modules import VAE
        >>> model = VAE("gaussian", {"num_samples": 8}, objective={"name": "iwae", "gradient": "dreg"})
        >>> model.objective.gradient
        'dreg'
    """

    name: ClassVar[str] = "iwae"
    gradient: Literal["pathwise", "stl", "dreg", "vimco", "ovis"] = "pathwise"
    control: Control = "geometric"

    def __post_init__(self) -> None:
        _choice("gradient", self.gradient, ("pathwise", "stl", "dreg", "vimco", "ovis"))
        _choice("control", self.control, get_args(Control))

    @property
    def detaches_draws(self) -> bool:
        return self.gradient in ("dreg", "vimco", "ovis")

    @property
    def stops_q(self) -> bool:
        return self.gradient in ("stl", "dreg")

    def check(self, layer: StochasticLayer) -> None:
        what = f"objective 'iwae' with gradient {self.gradient!r}"
        if self.gradient in ("vimco", "ovis"):
            _check_independent(what, layer, 2)
            return
        _check_pathwise(what, layer, "gradient='vimco' or 'ovis', which take discrete draws")
        if self.gradient == "dreg":
            _check_independent(what, layer, 1)
        if self.gradient == "stl" and layer.num_samples > 1:
            raise ValueError(
                f"needed num_samples=1 for {what}, got {layer.num_samples}: with more draws it is not the gradient of "
                "the bound. Use gradient='dreg', which is its unbiased successor."
            )

    def loss(self, terms: Terms, step: int) -> Tensor:
        log_weights = terms.log_weights
        bound = log_weights.logsumexp(0) - math.log(log_weights.shape[0])  # its gradient in the decoder is right in all
        if self.gradient in ("pathwise", "stl"):
            return -bound
        if self.gradient == "dreg":
            return -_value_and_gradient_of(bound, _doubly_reparameterized(terms, log_weights))
        weights = log_weights.detach()
        if self.gradient == "ovis":
            control = _others(weights) - math.log(weights.shape[0])
        else:
            control = _control(weights, self.control)
        return -_value_and_gradient_of(bound, _score(terms, bound.detach() - control))


def _doubly_reparameterized(terms: Terms, log_weights: Tensor) -> Tensor:
    """sum_k v_k^2 <z_k, d log w_k / d z_k> ``[B]``, with q at constant params: its gradient is that of DReG."""
    assert terms.z is not None and terms.z.requires_grad
    (slope,) = torch.autograd.grad(log_weights.sum(), terms.z, retain_graph=True)
    credit = (terms.sample.z * slope.detach()).flatten(2).sum(-1)  # [K, B]
    return (log_weights.detach().softmax(0).square() * credit).sum(0)


def _score(terms: Terms, advantage: Tensor) -> Tensor:
    """sum_k advantage_k log q(z_k) ``[B]`` at detached draws: its gradient is a score-function estimator."""
    assert terms.log_q is not None
    return (advantage * terms.log_q).sum(0)


@dataclass(frozen=True)
class Renyi(_MultiSample):
    r"""The variational Renyi bound of order alpha, estimated by K draws; another objective than the ELBO or IWAE.

    .. math:: L_\alpha = \frac{1}{1 - \alpha} \, E \log \frac1K \sum_k w_k^{1 - \alpha}

    A lower bound of log p(x) for alpha >= 0: alpha = 1 is the ELBO (by its limit), alpha = 0 the importance-weighted
    bound. For alpha < 0 the bound of infinitely many draws lies above log p(x). The estimate at finite K has its own
    expectation, whose gradient both options estimate without bias.

    Args:
        alpha: Order of the divergence, finite.
        gradient: ``"pathwise"`` for pathwise layers, or ``"vimco"`` for any layer with exact, independent, equally
            weighted draws, at least two.

    Raises:
        ValueError: Another gradient, or an infinite alpha.

    References:
        Renyi Divergence Variational Inference (Yingzhen Li, Richard E. Turner, 2016), https://arxiv.org/abs/1602.02311
    """

    name: ClassVar[str] = "renyi"
    alpha: float = 0.5
    gradient: Literal["pathwise", "vimco"] = "pathwise"

    def __post_init__(self) -> None:
        _choice("gradient", self.gradient, ("pathwise", "vimco"))
        if not math.isfinite(self.alpha):
            raise ValueError(f"needed a finite alpha, got {self.alpha}.")

    @property
    def detaches_draws(self) -> bool:
        return self.gradient == "vimco"

    def check(self, layer: StochasticLayer) -> None:
        what = f"objective 'renyi' with gradient {self.gradient!r}"
        if self.gradient == "vimco":
            _check_independent(what, layer, 2)
        else:
            _check_pathwise(what, layer, "gradient='vimco', which takes discrete draws")

    def loss(self, terms: Terms, step: int) -> Tensor:
        log_weights, k = terms.log_weights, terms.log_weights.shape[0]
        power = 1.0 - self.alpha
        bound = log_weights.mean(0) if power == 0 else ((power * log_weights).logsumexp(0) - math.log(k)) / power
        if self.gradient == "pathwise":
            return -bound
        weights = log_weights.detach()
        mean_of_others = (weights.sum(0) - weights) / (k - 1)
        control = mean_of_others if power == 0 else _control(power * weights, "geometric") / power
        return -_value_and_gradient_of(bound, _score(terms, bound.detach() - control))


@dataclass(frozen=True)
class RWS(_MultiSample):
    r"""Reweighted wake-sleep: wake-phase updates of the model (theta) and of q (phi); two objectives, one backward.

    .. math:: g_\theta = \sum_k v_k \nabla \log p(x, z_k), \qquad g_\phi = \sum_k v_k \nabla \log q(z_k)

    The model follows the gradient of the importance-weighted bound, q that of :math:`-KL(p(z \mid x) \| q)`, with the
    posterior estimated by self-normalised weights: biased at finite K, consistent in K. Not the gradient of one bound;
    the loss has the value of the importance-weighted bound. Takes any layer with exact, independent, equally weighted
    draws; these may be discrete.

    References:
        Reweighted Wake-Sleep (Joerg Bornschein, Yoshua Bengio, 2014), https://arxiv.org/abs/1406.2751
    """

    name: ClassVar[str] = "rws"

    @property
    def detaches_draws(self) -> bool:
        return True

    def check(self, layer: StochasticLayer) -> None:
        _check_independent("objective 'rws'", layer, 2)

    def loss(self, terms: Terms, step: int) -> Tensor:
        log_weights = terms.log_weights.detach()
        weights = log_weights.softmax(0)
        bound = log_weights.logsumexp(0) - math.log(log_weights.shape[0])
        return -_value_and_gradient_of(bound, (weights * terms.log_joint).sum(0), _score(terms, weights))


@dataclass(frozen=True)
class TVO(_MultiSample):
    r"""The thermodynamic variational objective: log p(x) as an integral along a path from q to the posterior.

    .. math:: \sum_{i=0}^{P-1} (\beta_{i+1} - \beta_i) \, E_{\pi_{\beta_i}} [\log w], \qquad
        \pi_\beta \propto p(x, z)^\beta q(z)^{1 - \beta}

    A left Riemann sum of a rising integrand, hence a lower bound of log p(x) and at least the ELBO, which it equals for
    one partition. The expectations use the K draws with self-normalised weights :math:`w^\beta`: the value and gradient
    are then those of the objective with a bias that falls with K (none for one partition). The gradient is a
    covariance, which needs neither reparameterization nor a differentiable cost: takes any layer with exact,
    independent, equally weighted draws.

    Args:
        partitions: Number P of intervals; their ends are 0, then log-uniform from ``first_beta`` to 1.
        first_beta: End of the first interval, in (0, 1).

    Raises:
        ValueError: An option out of range.

    References:
        The Thermodynamic Variational Objective (Vaden Masrani, Tuan Anh Le, Frank Wood, 2019),
        https://arxiv.org/abs/1907.00031
    """

    name: ClassVar[str] = "tvo"
    partitions: int = 5
    first_beta: float = 0.1

    def __post_init__(self) -> None:
        if self.partitions < 1:
            raise ValueError(f"needed partitions >= 1, got {self.partitions}.")
        if not 0 < self.first_beta < 1:
            raise ValueError(f"needed 0 < first_beta < 1, got {self.first_beta}.")

    @property
    def detaches_draws(self) -> bool:
        return True

    def check(self, layer: StochasticLayer) -> None:
        _check_independent("objective 'tvo'", layer, 2)

    def betas(self) -> list[float]:
        """The ends of the intervals, from 0 to 1: P + 1 numbers."""
        last = self.partitions - 1
        return [0.0, *(self.first_beta ** (1 - i / last) for i in range(last)), 1.0]

    def loss(self, terms: Terms, step: int) -> Tensor:
        assert terms.log_q is not None
        log_weights, log_q = terms.log_weights, terms.log_q
        k = log_weights.shape[0]
        ends = log_weights.new_tensor(self.betas())
        beta, width = ends[:-1].view(-1, 1, 1), ends.diff().view(-1, 1)  # [P, 1, 1], [P, 1]
        weights = (beta * log_weights.detach()).softmax(1)  # [P, K, B]
        mean = (weights * log_weights).sum(1)  # [P, B]
        deviation = (log_weights - mean.unsqueeze(1)).detach()
        log_pi = beta * terms.log_joint + (1 - beta) * log_q  # up to its constant, of which the covariance is free
        # K / (K - 1) makes the covariance of equal weights (beta = 0) unbiased
        covariance = (weights * deviation * log_pi).sum(1) * (k / (k - 1))
        return -(width * _value_and_gradient_of(mean, covariance)).sum(0)
