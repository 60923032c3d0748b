"""ReinMax with less variance: its Jacobian averaged over Gumbel noise, or accompanied by a control variate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochastic_layers.gumbel_straight_through import GumbelRao, Term, conditional_magnitude, conditional_ratios
from stochastic_layers.registry import register

__all__ = ["ReinMaxCV", "ReinMaxRao"]


def _scaled(terms: list[Term], factor: float) -> list[Term]:
    return [term._replace(weight=factor * term.weight) for term in terms]


@register("reinmax_rao")
class ReinMaxRao(GumbelRao):
    r"""ReinMax-Rao: ReinMax with Gumbel-Rao in place of straight-through at the middle of p and z.

    .. math:: \nabla_l \approx \Big( \frac2R \sum_r \tfrac1\tau J(\mathrm{softmax}(\theta_r / \tau)) - \tfrac12 J(p)
        \Big)^\top f'(z), \qquad \theta_r \sim \Big(\log \frac{p + z}{2} + G \;\Big|\; \arg\max = z \Big)

    Approximates the gradient of E_q[f] by the two terms of ``reinmax``, of which the first, noisy one is smoothed and
    thereby changed: biased at every temperature, also on quadratic costs, with less variance. One evaluation of the
    cost. On our small problems it trades the exactness of ``reinmax`` on quadratic costs for about half the variance on
    cubic ones (``docs/layers/straight_through.md``).

    The formula is that of the paper's published code, with the second term at p as in ReinMax.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        temperature: Temperature of the relaxed draws, positive.
        num_replicates: Number R of redraws of the noise for each draw.

    Raises:
        ValueError: ``temperature`` out of range, ``num_replicates < 1``, or sizes that do not fit the family.

    References:
        Beyond ReinMax: Low-Variance Gradient Estimators for Discrete Latent Variables (Daniel Wang, Thang D. Bui,
        2026), https://arxiv.org/abs/2603.08257

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("reinmax_rao", latent_dim=3, family="categorical", num_categories=4)
        >>> layer(torch.zeros(5, 12)).view(5, 3, 4).sum(-1).unique()
        tensor([1.])
    """

    reference = (
        "Beyond ReinMax: Low-Variance Gradient Estimators for Discrete Latent Variables (Wang and Bui, 2026). "
        "https://arxiv.org/abs/2603.08257"
    )

    def _terms(self, probs: Tensor, one_hot: Tensor) -> list[Term]:
        smooth = super()._terms((probs + one_hot) / 2, one_hot)
        return [*_scaled(smooth, 2.0), Term(probs.new_full((1,), -0.5), probs.unsqueeze(1))]

    def _bit_slope(self, rest: Tensor) -> Tensor:
        return 2 * super()._bit_slope(rest / 2) - 0.5 * rest * (1 - rest)


@register("reinmax_cv")
class ReinMaxCV(GumbelRao):
    r"""ReinMax-CV: ReinMax plus the difference of Gumbel-Rao and straight-through Gumbel at the middle of p and z.

    .. math:: \nabla_l \approx \big( 2 J(m) - \tfrac12 J(p) + \eta (\bar J - \tilde J) \big)^\top f'(z),
        \qquad m = \tfrac12 (p + z)

    with :math:`\bar J` the mean of :math:`J(\mathrm{softmax}(\theta / \tau)) / \tau` over R draws of
    :math:`\theta \sim (\log m + G \mid \arg\max = z)`, and :math:`\tilde J` the same at :math:`\log m + G` with the
    noise that drew z, for which :math:`\arg\max (l + G) = z`. Approximates the gradient of E_q[f] as ``reinmax``, which
    it is for :math:`\eta = 0`. The two means differ, because the same noise is conditioned under other logits: the
    control variate adds a bias, and its correlation with the draw can lower the variance. One evaluation of the cost.
    ``docs/layers/straight_through.md`` has both measured on small problems, where it does not pay.

    The formula is that of the paper's published code.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        temperature: Temperature of the control variate, positive.
        num_replicates: Number R of redraws of the noise for each draw.
        eta: Coefficient :math:`\eta` of the control variate, finite.

    Raises:
        ValueError: ``temperature`` out of range, ``num_replicates < 1``, ``eta`` not finite, or sizes that do not fit
            the family.

    References:
        Beyond ReinMax: Low-Variance Gradient Estimators for Discrete Latent Variables (Daniel Wang, Thang D. Bui,
        2026), https://arxiv.org/abs/2603.08257

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("reinmax_cv", latent_dim=3, family="categorical", num_categories=4)
        >>> layer(torch.zeros(5, 12)).view(5, 3, 4).sum(-1).unique()
        tensor([1.])
    """

    reference = ReinMaxRao.reference

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 1.0,
        num_replicates: int = 10,
        eta: float = 0.5,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            num_replicates=num_replicates,
        )
        if not math.isfinite(eta):
            raise ValueError(f"needed a finite eta, got {eta}; 0.5 to 1.5 is usual.")
        self.eta = float(eta)

    def _terms(self, probs: Tensor, one_hot: Tensor) -> list[Term]:
        middle, chosen = (probs + one_hot) / 2, (probs * one_hot).sum(0)
        # the noise of the draw, given the draw, under the logits that it was drawn with; then under those of the
        # middle, where the probability of the chosen one is 1 + 1 / p times that of the others
        ratios = conditional_ratios(probs, one_hot, 1)
        ratios.mul_(torch.where(one_hot > 0, 1.0, chosen / (1 + chosen)).unsqueeze(1))
        return [
            Term(probs.new_full((1,), 2.0), middle.unsqueeze(1)),
            Term(probs.new_full((1,), -0.5), probs.unsqueeze(1)),
            *_scaled(super()._terms(middle, one_hot), self.eta),
            Term(-self.eta / self.temperature.to(probs.dtype), self._tempered(ratios)),
        ]

    def _bit_slope(self, rest: Tensor) -> Tensor:
        chosen = 1 - rest
        heun = (1 - rest / 2) * rest - 0.5 * rest * chosen
        magnitude = conditional_magnitude(rest, 1).squeeze(0) + torch.log1p(1 / chosen)
        return heun + self.eta * (super()._bit_slope(rest / 2) - self._tempered_slope(magnitude))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eta={self.eta:g}"
