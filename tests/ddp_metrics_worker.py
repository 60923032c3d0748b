"""Started twice by test_ddp_metrics.py, and imported by it: evaluates and trains one model with all callbacks."""

import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import VAE, CollapseWarning, Pictures, StochasticClassifier

LAYERS = {
    "fsq": {"latent_dim": 3},
    "residual_vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 4, "depth": 2},
    "gaussian": {"latent_dim": 3},  # only its closed-form terms can be compared: its draws differ between ranks
}


class Recorder(L.Callback):
    """Keeps what the metrics say of each unit, before the Trainer resets them; all ranks have to ask."""

    def on_validation_epoch_end(self, trainer, module):
        metrics = module.evaluation("val")
        self.vectors = {"variances": metrics.active_units.variances(), "kl": metrics.kl_per_dimension.compute()}
        if metrics.perplexity is not None:
            self.vectors["frequencies"] = metrics.perplexity.frequencies()


def evaluate(name, folder, **options):
    """What one model measures on 11 examples in ordinary batches of 2, and the files that drawing it leaves."""
    L.seed_everything(0, verbose=False)
    data = TensorDataset((torch.rand(11, 1, 8, 8) > 0.5).float())
    recorder = Recorder()
    pictures = Pictures(str(folder), num_images=3, every_n_epochs=1)
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[recorder, pictures, CollapseWarning(after_steps=0, patience=1)], **options
    )
    model = VAE(name, LAYERS[name])
    trainer.validate(model, DataLoader(data, batch_size=2), verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    vectors = recorder.vectors
    trainer.fit(model, DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    return {"metrics": metrics, "vectors": vectors, "files": [f.name for f in pictures.files]}


def classify(**options):
    """What a classifier measures on the 11 examples, in ordinary batches of 1."""
    L.seed_everything(0, verbose=False)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    data = TensorDataset(torch.randn(11, 1, 8, 8), torch.arange(11) % 4)
    trainer = quiet_trainer(**options)
    trainer.validate(StochasticClassifier(network, 4, eval_draws=2), DataLoader(data, batch_size=1), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {name: evaluate(name, folder, devices=2, strategy="ddp") for name in LAYERS}
    results["classifier"] = classify(devices=2, strategy="ddp")
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
