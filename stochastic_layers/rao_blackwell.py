"""Rao-Blackwellised layers: one variable at a time is summed over exactly, given a draw of the others."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from stochastic_layers.categorical import draw_categorical, log_softmax, one_hot, softmax
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import check_points
from stochastic_layers.registry import register

__all__ = ["CoordinateFlip", "LocalExpectation"]


class _FlipLayer(StochasticLayer):
    """Each of K = ``num_samples`` draws of weight 1/K is followed by auxiliary copies in which one variable differs."""

    families = ("bernoulli", "categorical")
    unbiased = True
    needs = ("cost",)

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def check_num_samples(self, num_samples: int) -> None:
        points = num_samples * (1 + self.flips_per_draw)
        check_points(self.name, points, self.out_features, "'coordinate_flip' or 'leave_one_out'")

    @property
    def flips_per_draw(self) -> int:
        """Number of auxiliary copies of each draw."""
        return 1

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        draws = self.family.sample(q, self.num_samples)  # [K, *batch, out_features]
        if isinstance(self.family, CategoricalFamily):
            flips, factors = self._category_flips(self.family.unflatten(draws), self.family.unflatten(params))
        else:
            flips, factors = self._bit_flips(draws, params)
        z = torch.cat([draws.unsqueeze(1), flips], 1)  # [K, 1 + M, *batch, out_features]
        weights = torch.zeros(z.shape[:2], dtype=z.dtype, device=z.device)
        weights[:, 0] = 1.0 / self.num_samples
        # one weight per example, although all are equal: this declares that batch dimensions cannot be summed, because
        # an auxiliary point changes a variable of every example at once
        weights = weights.view(-1, *[1] * (params.dim() - 1)).expand(-1, *params.shape[:-1])

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach().reshape(z.shape[:-1])  # [K, 1 + M, *batch]
            return (factors * (cost[:, 1:] - cost[:, :1])).sum(1).mean(0)

        return self._sample(q, z.flatten(0, 1), weights=weights, credit=credit)

    @abstractmethod
    def _bit_flips(self, draws: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Flipped copies ``[K, M, *batch, out_features]`` and the factors of their cost differences, with gradient."""

    @abstractmethod
    def _category_flips(self, draws: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one-hot draws ``[K, *batch, L, C]`` and logits ``[*batch, L, C]``."""


@register("local_expectation")
class LocalExpectation(_FlipLayer):
    r"""Local expectation gradients: each variable is summed over exactly, the others stay as they were drawn.

    .. math:: \nabla E_q[f] \approx \sum_i \sum_c \nabla q_i(c) \, [f(z_{-i}, c) - f(z)], \qquad z \sim q

    (for a bit, :math:`\sigma'(\phi_i) [f(z_{-i}, 1) - f(z_{-i}, 0)]`). Approximates the gradient of E_q[f] for any f;
    unbiased, with a variance far below that of score-function layers: none at all for f linear in z. The
    same gradient as RAM and GO, because the variables are independent under q. Exactly zero for a constant f.

    The price is S = ``num_samples * (1 + latent_dim * (C - 1))`` points, all for one decoder call; the first of each
    group is the draw, the others are auxiliary with weight 0. The cost needs every batch dimension of params.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories C of a categorical variable; a bit has 2.
        num_samples: Number of draws per example, each with its auxiliary points.

    Raises:
        ValueError: The points of one example are more than 2 ** 28 numbers, as with some 16,000 categories.

    References:
        Local Expectation Gradients for Black Box Variational Inference (Michalis Titsias, Miguel Lázaro-Gredilla,
        2015), https://proceedings.neurips.cc/paper/2015/hash/1373b284bc381890049e92d324f56de0-Abstract.html

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("local_expectation", latent_dim=3)
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> sample = layer.sample(logits)
        >>> sample.surrogate(sample.z.sum(-1)).sum().backward()
        >>> sample.z.shape, logits.grad[0].tolist()
        (torch.Size([4, 5, 3]), [0.25, 0.25, 0.25])
    """

    evaluations = "num_samples * (1 + latent_dim * ((num_categories or 2) - 1))"
    reference = (
        "Local Expectation Gradients for Black Box Variational Inference (Titsias and Lázaro-Gredilla, 2015). "
        "https://proceedings.neurips.cc/paper/2015/hash/1373b284bc381890049e92d324f56de0-Abstract.html"
    )

    @property
    def flips_per_draw(self) -> int:
        return self.latent_dim * ((self.num_categories or 2) - 1)

    def _bit_flips(self, draws: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.latent_dim, dtype=draws.dtype, device=draws.device)
        eye = eye.view(self.latent_dim, *[1] * (logits.dim() - 1), self.latent_dim)
        flips = (draws.unsqueeze(1) - eye).abs()  # [K, L, *batch, L]
        factors = torch.sigmoid((1 - 2 * draws) * logits).movedim(-1, 1)  # probability of the other value
        return flips, factors

    def _category_flips(self, draws: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        latents, categories = logits.shape[-2:]
        place = torch.arange(categories, device=draws.device)
        shift = (place - torch.arange(1, categories, device=draws.device).unsqueeze(-1)) % categories  # [C - 1, C]
        others = draws[..., shift].movedim(-2, 1)  # [K, C - 1, *batch, L, C]: all latents moved on by 1, ..., C - 1
        eye = torch.eye(latents, dtype=torch.bool, device=draws.device)
        eye = eye.view(latents, *[1] * (logits.dim() - 1), latents, 1)
        flips = torch.where(eye, others.unsqueeze(1), draws[:, None, None])  # [K, L, C - 1, *batch, L, C]
        factors = (others * softmax(logits)).sum(-1).movedim(-1, 1)  # [K, L, C - 1, *batch]
        return flips.flatten(1, 2).flatten(-2), factors.flatten(1, 2)


@register("coordinate_flip")
class CoordinateFlip(_FlipLayer):
    r"""Random coordinate flip: one variable, chosen at random, takes one other value.

    .. math:: \nabla E_q[f] \approx L \, (1 - q_i(z_i)) \, [f(z_{-i}, c) - f(z)] \, \nabla \log q_i(c), \qquad
        i \sim U\{1, \dots, L\}, \quad c \sim q_i(\cdot \mid c \ne z_i)

    (for a bit, :math:`L \, \sigma'(\phi_i) [f(z_{-i}, 1) - f(z_{-i}, 0)]`). Approximates the gradient of E_q[f] for any
    f; unbiased. One term of ``local_expectation``, chosen at random: two evaluations whatever the size of the latent
    space, but a gradient for one coordinate at a time and a variance that grows with ``latent_dim``. Exactly zero for a
    constant f.

    S = ``2 * num_samples`` points: draw, flip, draw, flip, ...; flips have weight 0. The cost needs every batch
    dimension of params.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number of draws per example, each with its flip.

    References:
        Local Expectation Gradients for Black Box Variational Inference (Michalis Titsias, Miguel Lázaro-Gredilla,
        2015), https://proceedings.neurips.cc/paper/2015/hash/1373b284bc381890049e92d324f56de0-Abstract.html

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("coordinate_flip", latent_dim=3)
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> sample = layer.sample(logits)
        >>> sample.surrogate(sample.z.sum(-1)).sum().backward()
        >>> sample.z.shape, (logits.grad != 0).sum(-1).tolist()
        (torch.Size([2, 5, 3]), [1, 1, 1, 1, 1])
    """

    evaluations = "2 * num_samples"
    reference = LocalExpectation.reference

    def _bit_flips(self, draws: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self._choose(draws.shape[:-1], draws)
        flips = (draws - chosen).abs()
        factors = (chosen * torch.sigmoid((1 - 2 * draws) * logits)).sum(-1)
        return flips.unsqueeze(1), self.latent_dim * factors.unsqueeze(1)

    def _category_flips(self, draws: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self._choose(draws.shape[:-2], draws)  # [K, *batch, L]
        index = chosen.argmax(-1)[..., None, None].expand(*draws.shape[:-2], 1, draws.shape[-1])
        current = draws.gather(-2, index).squeeze(-2)  # [K, *batch, C]
        log_prob = log_softmax(logits.expand(draws.shape).gather(-2, index).squeeze(-2))
        rest = log_prob.detach().masked_fill(current > 0, -torch.inf)
        other = draw_categorical(softmax(rest), 1).squeeze(0)
        flips = torch.where(chosen.unsqueeze(-1) > 0, other.unsqueeze(-2), draws).flatten(-2)
        factors = rest.logsumexp(-1).exp() * (other * log_prob).sum(-1)
        return flips.unsqueeze(1), self.latent_dim * factors.unsqueeze(1)

    def _choose(self, shape: torch.Size, like: Tensor) -> Tensor:
        """One-hot vectors ``[*shape, latent_dim]`` that mark one variable each, uniformly."""
        index = torch.randint(self.latent_dim, (*shape, 1), device=like.device)
        return one_hot(index, like.new_empty(self.latent_dim))
