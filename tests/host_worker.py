"""Started by torchrun on every host: trains under ddp, and continues from the last checkpoint where there is one."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from lightning_modules import VAE, VerifiedCheckpointIO
from lightning_modules.data import Digits

STEPS = 12


class Die(L.Callback):
    """Kills this process after a step, once: the file ``marker`` remembers."""

    def __init__(self, marker, step):
        self.marker, self.step = marker, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.marker.exists():
            self.marker.write_text(f"rank {trainer.global_rank} killed after step {self.step}")
            os.kill(os.getpid(), signal.SIGKILL)


class Start(L.Callback):
    """Keeps the step at which training (re)started."""

    step = -1

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step


def main(folder, dying_rank, step):
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    callbacks = [ModelCheckpoint(folder / "checkpoints", every_n_train_steps=3, save_last=True, save_top_k=1)]
    start = Start()
    callbacks.append(start)
    if rank == dying_rank:
        callbacks.append(Die(folder / "killed", step))
    trainer = quiet_trainer(
        strategy="ddp",
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        max_steps=STEPS,
        limit_train_batches=5,  # steps 3, 6, 9, 12 of the checkpoints lie inside epochs
        limit_val_batches=1,
        callbacks=callbacks,
        plugins=[VerifiedCheckpointIO()],
        enable_checkpointing=True,
    )
    assert trainer.world_size == world
    model = VAE("reinforce", {"latent_dim": 8, "num_samples": 2, "baseline": "moving_average"})
    trainer.fit(model, Digits(batch_size=16, binarization="dynamic"), ckpt_path="last")
    result = {"state": model.state_dict(), "step": trainer.global_step, "start": start.step}
    result["restarts"] = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.save(result, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
