"""Coupled layers of categorical variables: antithetic draws by importance weights, and draws by swapped noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from stochastic_layers.arms import copula_bits, independence_ratio
from stochastic_layers.auxiliary import as_drawn
from stochastic_layers.binary_codes import ordered_sticks
from stochastic_layers.categorical import one_hot
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.noise import exponential
from stochastic_layers.options import check_points, require_two
from stochastic_layers.registry import register

__all__ = ["ARSM", "CARMS", "pair_ratios"]


def _append_dims(tensor: Tensor, ndim: int) -> Tensor:
    return tensor.reshape(*tensor.shape, *[1] * (ndim - tensor.dim()))


def pair_ratios(stick_logits: Tensor, num_samples: int) -> Tensor:
    r"""q(z_i) q(z_j) / P(z_i, z_j) of two stick-breaking draws that differ, by the first stick m that decides.

    .. math:: \rho_m = \frac{\pi_m (1 - \pi_m)}{P(b_m = 1, b'_m = 0)} \prod_{i < m}
        \frac{(1 - \pi_i)^2}{P(b_i = b'_i = 0)}

    In ascending order all but the last stick have probability 1/3 or less, so that the product is less than 2.

    Args:
        stick_logits: ``[..., C - 1]`` of categories in ascending order.
        num_samples: Number K of draws.

    Returns:
        ``[..., C - 1]``, without gradient.
    """
    decides = independence_ratio(stick_logits, num_samples)
    phi = stick_logits.detach()[..., :-1]
    # 1 - P(1, 0) / (1 - pi), where P(1, 0) = pi (1 - pi) / decides
    both_zero = 1 - torch.sigmoid(phi) / decides[..., :-1]
    log_passes = (logsigmoid(-phi) - both_zero.log()).cumsum(-1)
    return decides * pad(log_passes, (1, 0)).exp()


@register("carms")
class CARMS(StochasticLayer):
    r"""CARMS: any number of mutually antithetic categorical draws, with importance weights.

    .. math:: \nabla_l E_q[f] \approx \frac1{2K(K-1)} \sum_{i \ne j} (f(z_i) - f(z_j)) \rho(z_i, z_j) (z_i - z_j),
        \qquad \rho(z, z') = \frac{q(z) q(z')}{P(z, z')}

    The K draws break sticks with uniforms of a Dirichlet copula, the rarest category first, so that they repeat each
    other less than independent draws, and the weight is less than 2. Unbiased for any cost. Every draw is exact, and
    all enter the value and the decoder's gradient. With two categories it is ARMS, with two draws the
    importance-weighted DisARM of Dong et al. (2021). Each latent variable has the weight of its own pairs: a product
    over the latents would be biased, as two draws never agree on a rare category.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each variable.
        family: ``"categorical"``.
        num_samples: Number K of draws, at least 2.

    Raises:
        ValueError: ``num_samples < 2``.

    References:
        CARMS: Categorical-Antithetic-REINFORCE Multi-Sample Gradient Estimator (Alek Dimitriev, Mingyuan Zhou, 2021),
        https://arxiv.org/abs/2110.14002; Coupled Gradient Estimators for Discrete Latent Variables (Zhe Dong, Andriy
        Mnih, George Tucker, 2021), https://arxiv.org/abs/2106.08056

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("carms", latent_dim=3, num_categories=4)
        >>> layer.sample(torch.zeros(5, 12)).z.shape
        torch.Size([4, 5, 12])
    """

    families = ("categorical",)
    unbiased = True
    needs = ("cost",)
    reference = (
        "CARMS: Categorical-Antithetic-REINFORCE Multi-Sample Gradient Estimator (Dimitriev and Zhou, 2021). "
        "https://arxiv.org/abs/2110.14002"
    )

    def __init__(
        self, latent_dim: int, *, num_categories: int | None = None, family: str = "categorical", num_samples: int = 4
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def check_num_samples(self, num_samples: int) -> None:
        require_two(num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        assert isinstance(self.family, CategoricalFamily)
        logits = self.family.unflatten(params)
        count = self.num_samples
        sticks, decode = ordered_sticks(logits.detach(), "ascending")
        bits = copula_bits(sticks, count)
        z, reached = decode(bits)  # [K, *batch, L, C], [K, *batch, L, C - 1]
        stop = reached.sum(-1).long() - 1  # the last stick looked at: it decides, or nothing was left
        first = torch.minimum(stop.unsqueeze(0), stop.unsqueeze(1))  # [K, K, *batch, L]
        read = as_drawn(z)
        ratios = pair_ratios(sticks, count)
        ratio = ratios.expand(count, count, *ratios.shape).gather(-1, first.unsqueeze(-1)).squeeze(-1)

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach()
            difference = _append_dims(cost.unsqueeze(1) - cost.unsqueeze(0), ratio.dim())
            advantage = (ratio * difference).sum(1) / (count * (count - 1))  # [K, *batch, L]
            # pairs that agree need no exception: their terms cancel, whatever their ratio
            return sum_rightmost(advantage * (read() * logits).sum(-1), cost.dim()).sum(0)

        return self._sample(self.law(params), z.flatten(-2), credit=credit)


@register("arsm")
class ARSM(StochasticLayer):
    r"""ARSM: augment-REINFORCE-swap-merge, one draw of noise and all swaps of two of its entries.

    .. math:: \nabla_{l_c} E_q[f] \approx \sum_j \bigl( f(z^{c \leftrightarrow j})
        - \tfrac1C \sum_m f(z^{m \leftrightarrow j}) \bigr) \bigl(\tfrac1C - \pi_j\bigr), \qquad
        \pi \sim \mathrm{Dirichlet}(1), \; z = \arg\min_c (\log \pi_c - l_c)

    Unbiased for any cost. The same two entries are swapped in all latents at once, and every swap is an exact draw, so
    that all enter the value and the decoder's gradient. Of the C^2 swaps, C(C-1)/2 + 1 are different, and these are
    evaluated, whether or not they lead to different categories: the shape of z must not depend on the draw.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number C of categories of each variable.
        family: ``"categorical"``.
        num_samples: Number of draws of the noise, each with ``C * (C - 1) / 2 + 1`` points.

    Raises:
        ValueError: The points of one example are more than 2 ** 28 numbers, as with some 800 categories.

    References:
        ARSM: Augment-REINFORCE-Swap-Merge Estimator for Gradient Backpropagation Through Categorical Variables
        (Mingzhang Yin, Yuguang Yue, Mingyuan Zhou, 2019), https://arxiv.org/abs/1905.01413

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("arsm", latent_dim=3, num_categories=4)
        >>> layer.sample(torch.zeros(5, 12)).z.shape
        torch.Size([7, 5, 12])
    """

    families = ("categorical",)
    unbiased = True
    needs = ("cost",)
    evaluations = "num_samples * (num_categories * (num_categories - 1) // 2 + 1)"
    reference = (
        "ARSM: Augment-REINFORCE-Swap-Merge Estimator for Gradient Backpropagation Through Categorical Variables "
        "(Yin, Yue and Zhou, 2019). https://arxiv.org/abs/1905.01413"
    )

    swaps: Tensor
    point: Tensor

    def __init__(
        self, latent_dim: int, *, num_categories: int | None = None, family: str = "categorical", num_samples: int = 1
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        assert self.num_categories is not None
        size = self.num_categories
        count = self._num_swaps
        m, j = torch.triu_indices(size, size, 1)
        number = torch.arange(1, count)  # no swap is point 0
        swaps = torch.arange(size).repeat(count, 1)  # [T, C]
        swaps[number, m], swaps[number, j] = j, m
        point = torch.zeros(size, size, dtype=torch.long)  # [C, C], the point of each swap
        point[m, j] = point[j, m] = number
        self.register_buffer("swaps", swaps, persistent=False)
        self.register_buffer("point", point, persistent=False)

    @property
    def _num_swaps(self) -> int:
        """Number of different swaps, none among them."""
        assert self.num_categories is not None
        return self.num_categories * (self.num_categories - 1) // 2 + 1

    def check_num_samples(self, num_samples: int) -> None:
        check_points("arsm", num_samples * self._num_swaps, self.out_features, "'carms' or 'leave_one_out'")

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        assert isinstance(self.family, CategoricalFamily)
        logits = self.family.unflatten(params)
        size, repeats = logits.shape[-1], self.num_samples
        shape = (repeats, *logits.shape)
        noise = exponential(shape, logits)
        pull = 1 / size - noise / noise.sum(-1, keepdim=True)  # [R, *batch, L, C]
        score = noise.log()[..., self.swaps] - logits.detach().unsqueeze(-2)  # [R, *batch, L, T, C]
        index = score.argmin(-1, keepdim=True)
        z = one_hot(index, score)
        z = z.movedim(-2, 0).flatten(0, 1).flatten(-2)  # [T * R, *batch, L * C]

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach()
            cost = cost.reshape(cost.shape[0] // repeats, repeats, *cost.shape[1:])
            cost = cost - cost[:1]  # so that a constant cost is exactly zero below, whatever its rounding
            advantage = cost[self.point]  # [C, C, R, *lead]
            advantage = (advantage - advantage.mean(0)).movedim((1, 0), (-2, -1))  # [R, *lead, C (of j), C (of c)]
            lead = advantage.dim() - 2
            ones = [1] * (pull.dim() - 1 - lead)  # batch dimensions that the cost has summed, and the latents
            advantage = advantage.reshape(*advantage.shape[:lead], *ones, size, size)
            dtype = torch.promote_types(pull.dtype, advantage.dtype)
            gradient = (pull.unsqueeze(-2).to(dtype) @ advantage.to(dtype)).squeeze(-2)  # [R, *batch, L, C]
            return sum_rightmost(gradient * logits, lead).mean(0)

        return self._sample(self.law(params), z, credit=credit)
