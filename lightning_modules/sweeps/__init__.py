"""W&B sweeps without a network: the files of `wandb sweep`, W&B's own search, trials as processes, a ranking."""

from lightning_modules.sweeps.plan import Plan
from lightning_modules.sweeps.ranking import Row, rank
from lightning_modules.sweeps.record import TrialRecord
from lightning_modules.sweeps.runner import Runner
from lightning_modules.sweeps.state import SweepState, Trial

__all__ = ["Plan", "Row", "Runner", "SweepState", "Trial", "TrialRecord", "rank"]
