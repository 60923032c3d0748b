"""A warning where the latents of a model say nothing about the data, and what to try."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.base import LatentVariableModel
from lightning_modules.objectives import ELBO

__all__ = ["CollapseWarning"]


class CollapseWarning(Callback):
    """Warns, once in a run, of a posterior collapse: latents that are the same whatever the data.

    The criterion: in ``patience`` validations in a row fewer than ``min_active`` of the units of the first layer are
    active (:class:`~lightning_modules.metrics.ActiveUnits`: the variance of the posterior mean over the validation data
    is above 0.01). Validations before optimizer step ``after_steps``, or before the KL has reached its full weight, do
    not count. It reads the logged ``val/active_units``, and neither draws random numbers nor changes anything.

    Args:
        min_active: Share of active units below which a validation counts as collapsed, in (0, 1].
        after_steps: Number of optimizer steps of grace.
        patience: Number of validations in a row.

    Raises:
        ValueError: An option out of range.

    References:
        Generating Sentences from a Continuous Space (Samuel R. Bowman, Luke Vilnis, Oriol Vinyals, Andrew M. Dai, Rafal
        Jozefowicz, Samy Bengio, 2015), https://arxiv.org/abs/1511.06349
    """

    def __init__(self, min_active: float = 0.05, after_steps: int = 1000, patience: int = 5) -> None:
        if not 0 < min_active <= 1:
            raise ValueError(f"needed 0 < min_active <= 1, got {min_active}.")
        if after_steps < 0:
            raise ValueError(f"needed after_steps >= 0, got {after_steps}.")
        if patience < 1:
            raise ValueError(f"needed patience >= 1, got {patience}.")
        self.min_active, self.after_steps, self.patience = min_active, after_steps, patience
        self.collapsed = 0  # validations in a row
        self.warned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(pl_module, LatentVariableModel):
            return
        objective = pl_module.objective
        warmup = objective.kl_warmup_steps if isinstance(objective, ELBO) else 0
        active = trainer.callback_metrics.get("val/active_units")
        if active is None or trainer.global_step < max(self.after_steps, warmup):
            return
        units = pl_module.evaluation("val").active_units.num_units
        self.collapsed = self.collapsed + 1 if float(active) < self.min_active * units else 0
        if self.collapsed >= self.patience and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"posterior collapse: {int(active)} of {units} latent units vary with the data at step "
                f"{trainer.global_step} (variance of the posterior mean above 0.01), so that the decoder is told "
                f"next to nothing about x. {_advice(pl_module)}"
            )

    def state_dict(self) -> dict[str, int | bool]:
        return {"collapsed": self.collapsed, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, int | bool]) -> None:
        self.collapsed, self.warned = int(state_dict["collapsed"]), bool(state_dict["warned"])


def _advice(model: LatentVariableModel[object]) -> str:
    if model.stochastic_layers[0].family.name == "quantized":
        return (
            "Try fewer codes (num_codes), a smaller learning rate, or an encoder whose outputs are normalised; look at "
            "val/perplexity."
        )
    tries = ["a smaller learning rate", "a decoder that is not so strong", "an estimator with less gradient variance"]
    if isinstance(model.objective, ELBO):
        tries = [
            "objective={'name': 'elbo', 'kl_warmup_steps': 5000} (the KL comes in slowly)",
            "'free_bits': 0.1 (a KL below that many nats per latent costs nothing)",
            *([f"a beta below {model.objective.beta:g}"] if model.objective.beta > 0 else []),
            *tries,
        ]
    return "Try " + ", ".join(tries[:-1]) + f", or {tries[-1]}."
