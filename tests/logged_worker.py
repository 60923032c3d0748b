"""Started twice by test_ranks.py: what is logged in training on uneven batches, by each rank."""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from scale_runs import build, build_hierarchy, fit, shares, state

NAMES = ("enumeration", "reinforce:leave_one_out")


class Logged(L.Callback):
    """Keeps what was logged at every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        names = [name for name in trainer.callback_metrics if name.startswith("train/") and "grad" not in name]
        self.steps.append({name: float(trainer.callback_metrics[name]) for name in names})


def logged(model, batches, **options):
    seen = Logged()
    fit(model, batches, callbacks=[seen], log_every_n_steps=1, max_epochs=1, **options)
    return seen.steps, state(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    models = {name: build(name, lr=0.01) for name in NAMES} | {"hierarchy": build_hierarchy(lr=0.01)}
    found = {name: logged(model, shares()[rank], devices=2, strategy="ddp") for name, model in models.items()}
    torch.save(found, Path(sys.argv[1]) / f"rank{rank}.pt")
