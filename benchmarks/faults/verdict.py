"""What became of one trial of a campaign."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Verdict"]


@dataclass
class Verdict:
    """What became of one trial.

    Attributes:
        fault: Name of the scenario.
        layer: The layer that was trained.
        ranks: Number of processes.
        seed: Of the trial.
        first: How the job ended at which the fault happened: ``finished``, ``error``, ``signal`` or ``hang``.
        reached: The step it had come to; of a comparison or a sweep, the number of runs that were finished.
        resumed: The step (the number of runs) from which the next job continued, -1 where none was needed.
        lost: Steps (runs) that were made and had to be made again.
        offered: Whether a damaged checkpoint was refused and another one offered.
        launcher: Whether a rank waited for one that was gone and had to be ended, as torchrun does.
        message: The error, shortened.
        problem: What is wrong with this trial; empty where nothing is.
        seconds: How long the trial took.
    """

    fault: str
    layer: str
    ranks: int
    seed: int
    first: str
    reached: int
    resumed: int = -1
    lost: int = 0
    offered: bool = False
    launcher: bool = False
    message: str = ""
    problem: str = ""
    seconds: float = 0.0
