"""Started by test_noise.py: Lightning itself makes two processes, which begin with the random state of this one."""

import sys
from pathlib import Path

import lightning as L
import torch
from quiet_trainer import quiet_trainer

from lightning_modules import VAE, ReproducibleNoise
from lightning_modules.data import Digits


class Recorder(L.Callback):
    """Writes what was drawn after every batch, and the weights."""

    def __init__(self, folder):
        self.folder, self.noise = folder, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.noise.append(torch.rand(2))

    def on_train_end(self, trainer, module):
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        found = {"noise": torch.stack(self.noise), "weights": weights}
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    folder, strategy, mode = Path(sys.argv[1]), *sys.argv[2:]
    L.seed_everything(0, verbose=False)
    callbacks = [Recorder(folder), ReproducibleNoise(mode=mode)]
    trainer = quiet_trainer(devices=2, strategy=strategy, max_epochs=1, limit_train_batches=3, callbacks=callbacks)
    model = VAE("reinforce", {"latent_dim": 4, "baseline": "moving_average"})
    trainer.fit(model, Digits(batch_size=31, binarization="dynamic"))
