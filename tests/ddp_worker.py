"""Started twice by test_ddp.py: trains the VAE with every layer under plain DDP, and writes what each rank saw."""

import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from quiet_trainer import quiet_trainer

from lightning_modules import VAE
from lightning_modules.data import Digits


class Recorder(L.Callback):
    """Keeps the noise that a rank would draw, by drawing some after every batch."""

    def __init__(self):
        self.noise = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.noise.append(torch.rand(2))


def train(name, options):
    L.seed_everything(0, verbose=False)
    recorder = Recorder()
    trainer = quiet_trainer(
        devices=2,
        strategy="ddp",
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=2,
        log_every_n_steps=2,
        callbacks=[recorder],
    )
    model = VAE(name, options)
    trainer.fit(model, Digits(batch_size=31, binarization="dynamic"))
    return {
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "buffers": [b.clone() for b in model.layer.buffers()],
        "noise": torch.stack(recorder.noise),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {}
    for name in names:
        key, _, baseline = name.partition(":")
        results[name] = train(key, {"baseline": baseline, "num_samples": 2} if baseline else {})
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
