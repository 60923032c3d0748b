"""Distribution families: how the last dimension of params becomes a ``torch.distributions`` law, and its draws z."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from stochastic_layers.auxiliary import as_drawn
from stochastic_layers.options import check_positive_int
from stochastic_layers.registry import nearest

__all__ = ["Family", "create_family", "register_family", "takes_categories"]

MAX_PARAM = 1e18  # its square stays finite in float32, and so do sums and reflections of draws
MAX_LOG_VARIANCE = 80.0  # exp(80) and its square root stay finite in float32, and so does the KL to a standard normal


class Family(ABC):
    """A family of factorised laws of ``latent_dim`` variables.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each; only categorical families take it.
    """

    name: ClassVar[str]
    discrete: ClassVar[bool]
    takes_categories: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("logits",)  # what params holds, in this order along its last dimension

    def __init__(self, latent_dim: int, num_categories: int | None = None) -> None:
        self.latent_dim = check_positive_int("latent_dim", latent_dim, "pass the number of latent variables")
        if self.takes_categories:
            if not isinstance(num_categories, int) or isinstance(num_categories, bool) or num_categories < 2:
                raise ValueError(
                    f"needed num_categories >= 2 for family {self.name!r}, got {num_categories!r}; pass it."
                )
        elif num_categories is not None:
            raise ValueError(
                f"family {self.name!r} has no num_categories, got {num_categories!r}; leave it out or use "
                "family='categorical'."
            )
        self.num_categories = num_categories

    @property
    def spec(self) -> str | Mapping[str, Any]:
        """What a layer takes as ``family`` to have this one: its name, or a mapping with its options."""
        return self.name

    @property
    def in_features(self) -> int:
        """Size of the last dimension of params."""
        return self.latent_dim * (self.num_categories or 1) * len(self.parts)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Size of the last dimension of each part of params."""
        return (self.in_features // len(self.parts),) * len(self.parts)

    @property
    def out_features(self) -> int:
        """Size of the last dimension of z."""
        return self.latent_dim * (self.num_categories or 1)

    def unflatten(self, tensor: Tensor) -> Tensor:
        """``[..., latent_dim * n]``, latent by latent, -> ``[..., latent_dim, n]``."""
        return tensor.reshape(*tensor.shape[:-1], self.latent_dim, tensor.shape[-1] // self.latent_dim)

    @abstractmethod
    def distribution(self, params: Tensor) -> Distribution:
        """The law q of params ``[*batch, in_features]``; batch shape ``[*batch]``."""

    @abstractmethod
    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        """Exact draws ``[S, *batch, out_features]`` without gradient."""

    def sample_with_log_prob(self, q: Distribution, num_samples: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """Exact draws without gradient, and the function that gives log q of them ``[S, *batch]``, with its gradient.

        The function is cheaper than :meth:`log_prob` where a draw is known by less than z.
        """
        z = self.sample(q, num_samples)
        read = as_drawn(z)
        return z, lambda: self.log_prob(q, read())

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        """Draws ``[S, *batch, out_features]`` with a gradient, of families that torch can reparameterize."""
        return q.rsample(torch.Size((num_samples,)))

    @abstractmethod
    def mode(self, q: Distribution) -> Tensor:
        """The most probable z ``[*batch, out_features]``."""

    def center(self, q: Distribution) -> Tensor:
        """Where q lies, some numbers for each latent variable ``[*batch, ...]``: they vary over data if it is active.

        The mean of z; its mode where that has no closed form.
        """
        try:
            return q.mean
        except NotImplementedError:
            return self.mode(q)

    @abstractmethod
    def standard(self) -> Distribution:
        """The customary prior: batch shape ``[]`` and the event shape of q."""

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        """log q(z) ``[S, *batch]`` of z ``[S, *batch, out_features]``."""
        # the sum of Independent cannot be used: it fails for an empty batch
        result: Tensor = q.base_dist.log_prob(z).sum(-1) if isinstance(q, Independent) else q.log_prob(z)
        return result

    @property
    def num_outcomes(self) -> int:
        """Number of values of one latent variable; 0 where there is no end of them."""
        return 0

    def outcome_scores(self, params: Tensor) -> Tensor:
        """log q of every value of each latent variable ``[*batch, latent_dim, num_outcomes]``, up to a constant.

        Raises:
            ValueError: The family has no end of values.
        """
        raise ValueError(f"needed a family with finitely many outcomes, got {self.name!r}.")

    def outcome_values(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """z ``[..., out_features]`` of which each latent variable has the value of a number ``[..., latent_dim]``.

        Raises:
            ValueError: The family has no end of values.
        """
        raise ValueError(f"needed a family with finitely many outcomes, got {self.name!r}.")

    def outcomes(self, dtype: torch.dtype) -> Tensor:
        """Every z ``[num_outcomes ** latent_dim, out_features]``; the last latent variable changes first.

        Raises:
            ValueError: The family has no end of values.
        """
        index = torch.cartesian_prod(*[torch.arange(self.num_outcomes)] * self.latent_dim)
        return self.outcome_values(index.view(-1, self.latent_dim), dtype)

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        """Points and weights of which expectations under q are made: ``(weights * f(z)).sum(0)``, for few variables.

        Layers are proven against these, and so will be those of a family of yours that has them. All outcomes of a
        finite family with their probabilities; a rule of numerical integration else. Both may depend on the params of
        q, such that the gradient of the sum is that of the expectation.

        Args:
            q: The law, of batch shape ``[*batch]``.
            refinement: The rule is the finer the larger it is; the difference that 1 makes to 0 estimates the error.

        Returns:
            z ``[N, *batch, out_features]`` and weights ``[N, *batch]``.

        Raises:
            ValueError: The family has no rule, or too many variables for it.
        """
        if not self.num_outcomes:
            raise ValueError(
                f"needed a family whose expectations can be computed, got {self.name!r}, which has no nodes()."
            )
        batch, z = q.batch_shape, self.outcomes(self.mode(q).dtype)
        z = z.view(-1, *[1] * len(batch), self.out_features).expand(-1, *batch, -1)
        return z, self.log_prob(q, z).exp()

    @property
    def _advice(self) -> str:
        """What to do about params that are not finite, or too large."""
        mask = "; mask logits with -1e4 instead of -inf" if self.num_outcomes else ""
        return f"look at the network before the layer (learning rate, input scale, gradient clipping){mask}."

    def check(self, params: Tensor, low: float, high: float) -> None:
        """Refuse params that have no finite law; ``low`` and ``high`` are their extremes.

        Raises:
            ValueError: NaN or infinite params, or ones whose law overflows.
        """
        if not (low > -float("inf") and high < float("inf")):
            bad = int((~torch.isfinite(params)).sum())
            raise ValueError(
                f"needed finite params, got {bad} NaN or infinite values in {list(params.shape)}; {self._advice}"
            )
        if max(-low, high) > MAX_PARAM:
            raise ValueError(
                f"needed params of magnitude at most {MAX_PARAM:g}, got {max(-low, high):.3g}, whose square overflows "
                f"in float32; {self._advice}"
            )

    def prepare(self, params: Tensor | Sequence[Tensor]) -> Tensor:
        """Join, check and promote params to at least float32.

        Raises:
            ValueError: Wrong type, last dimension or value.
        """
        if isinstance(params, (tuple, list)):
            if len(params) != len(self.parts):
                raise ValueError(
                    f"needed one tensor or the {len(self.parts)} tensors {self.parts} for family {self.name!r}, got "
                    f"{len(params)}."
                )
            if not all(isinstance(part, Tensor) for part in params):
                raise ValueError(
                    f"needed tensors as the parts {self.parts}, got {[type(part).__name__ for part in params]}."
                )
            sizes = self.part_sizes
            try:
                batch = torch.broadcast_shapes(*[part.shape[:-1] for part in params])  # type: ignore[no-untyped-call]
                params = torch.cat([part.expand(*batch, n) for part, n in zip(params, sizes, strict=True)], -1)
            except RuntimeError as error:
                raise ValueError(
                    f"needed the parts {self.parts} as [*batch, n] with n = {sizes} for family {self.name!r}, got "
                    f"{[list(part.shape) for part in params]}; size the layer before by layer.in_features."
                ) from error
        if not isinstance(params, Tensor):
            raise ValueError(f"needed a tensor of params, got {type(params).__name__}.")
        if not params.is_floating_point():
            raise ValueError(
                f"needed floating-point params, got {params.dtype}; they are {' and '.join(self.parts)}, not draws: "
                "convert with .float()."
            )
        if params.dim() < 1 or params.shape[-1] != self.in_features:
            channels = params.dim() > 2 and params.shape[1] == self.in_features
            raise ValueError(
                f"needed params [*batch, {self.in_features}] for family {self.name!r} with latent_dim="
                f"{self.latent_dim}"
                + (f" and num_categories={self.num_categories}" if self.num_categories else "")
                + f", got {list(params.shape)}; "
                + ("wrap the layer in sl.ChannelsFirst." if channels else "size the layer before by layer.in_features.")
            )
        if params.dtype in (torch.float16, torch.bfloat16):
            params = params.float()
        if torch.compiler.is_compiling():  # no branch on values in a graph: checked on the device, as the graph runs
            torch._assert_async(torch.isfinite(params).all(), "needed finite params, got NaN or infinite values")
        elif params.numel():
            self._look(params.detach())
        return params

    def _look(self, values: Tensor) -> None:
        if torch._C._are_functorch_transforms_active():
            _Look.apply(values, self._look)  # type: ignore[no-untyped-call]
        else:
            low, high = torch.aminmax(values)  # one pass, one synchronisation; NaN propagates
            self.check(values, low.item(), high.item())


class _Look(torch.autograd.Function):
    """Calls a function of values that ``torch.func`` wraps with what is wrapped: of ``vmap``, all examples at once."""

    @staticmethod
    def forward(values: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        look(values)
        return values.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor, look: Callable[[Tensor], None]) -> tuple[Tensor, None]:
        result: Tensor = _Look.apply(values.movedim(in_dims[0], 0), look)  # type: ignore[no-untyped-call]
        return result, None


_FAMILIES: dict[str, type[Family]] = {}


def register_family(cls: type[Family]) -> type[Family]:
    """Class decorator that makes a family known under its ``name``.

    Raises:
        ValueError: The name is taken by another class.
    """
    if _FAMILIES.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"needed a name that is free, got {cls.name!r}, which is already {_FAMILIES[cls.name]}.")
    return cls


def create_family(family: str | Mapping[str, Any], latent_dim: int, num_categories: int | None = None) -> Family:
    """Build a family from its name, or from a mapping ``{"name": ..., **options}`` of one that has options.

    Raises:
        ValueError: Unknown name or option, or sizes that do not fit.
    """
    options: dict[str, Any] = {"name": family} if isinstance(family, str) else dict(family)
    name = options.pop("name", None)
    if name not in _FAMILIES:
        raise ValueError(f"needed the name of a family, got {name!r}; {nearest(str(name), _FAMILIES)}")
    known = [*signature(_FAMILIES[name]).parameters][2:]  # after the sizes
    for option in options:
        if option not in known:
            meant = nearest(str(option), known) if known else "it has none."
            raise ValueError(f"needed options of family {name!r}, got {option!r}; {meant}")
    try:
        return _FAMILIES[name](latent_dim, num_categories, **options)
    except TypeError as error:
        raise ValueError(f"needed options of family {name!r}, got {sorted(options)}: {error}.") from error


def takes_categories(name: str) -> bool:
    """Whether the family called ``name`` has ``num_categories``."""
    return name in _FAMILIES and _FAMILIES[name].takes_categories
