"""When something is due in training: steps as the Trainer's log counts them."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Trainer

__all__ = ["ends_a_step", "log_interval", "step_is_due"]


def log_interval(trainer: Trainer) -> int:
    """``log_every_n_steps`` of a Trainer, in optimizer steps."""
    return max(1, int(cast(Any, trainer).log_every_n_steps))


def step_is_due(trainer: Trainer, every: int) -> bool:
    """Whether the step that is being made is the ``every``-th one, 2 ``every``-th, ...; steps as the log counts them.

    Not ``global_step``, which counts the steps of every optimizer: with two of them under manual optimization it is
    even at each batch, and nothing would be due where ``every`` is even.
    """
    return every > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def ends_a_step(trainer: Trainer) -> bool:
    """Whether the batch that is ending makes an optimizer step: with accumulated gradients the last of several does."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()
