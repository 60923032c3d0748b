"""Started by test_gradient_monitor_ddp.py on one or two processes: trains on the same joined batches, watched."""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import VAE, GradientVarianceMonitor

STEPS, BATCH = 4, 8  # of both ranks together


def train(world, layer, options, *, num_draws=2, never=False, steps=STEPS, **trainer_options):
    L.seed_everything(0, verbose=False)
    x = torch.rand(2 * STEPS * BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()
    if never:
        monitor = GradientVarianceMonitor(every_n_steps=0)
    else:
        monitor = GradientVarianceMonitor(1, num_draws, BATCH, weights=True, decay=0.9, basket=["reinforce"])
    trainer = quiet_trainer(
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
        max_steps=steps,
        log_every_n_steps=1,
        callbacks=[monitor],
        **trainer_options,
    )
    small = {"name": "mlp", "hidden_features": (8,)}
    model = VAE(layer, options, encoder=small, decoder=small, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3))
    share = x[int(os.environ.get("RANK", "0")) :: world]  # Lightning's own sampler would shuffle
    trainer.fit(model, DataLoader(TensorDataset(share), batch_size=BATCH // world))
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "moments": [] if never else [m.mean for m in monitor.moments],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    exact = {"latent_dim": 4}
    moving = {"latent_dim": 4, "num_samples": 1, "baseline": "moving_average"}
    loo = {"latent_dim": 4, "num_samples": 2, "baseline": "leave_one_out"}
    torch.save(
        {
            "exact": train(world, "enumeration", exact),
            "noisy": train(world, "reinforce", loo, num_draws=400, steps=1),
            "accumulated": train(world, "enumeration", exact, accumulate_grad_batches=2, gradient_clip_val=0.1),
            "watched": train(world, "reinforce", moving),
            "never": train(world, "reinforce", moving, never=True),
        },
        folder / f"world{world}-rank{os.environ.get('RANK', '0')}.pt",
    )
