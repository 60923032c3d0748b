"""Runs of the VAE with any layer, as one of several ranks or as one process on the joined batches."""

import warnings

import lightning as L
import torch
from joined_noise import JoinedNoise
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

import stochastic_layers as sl
from lightning_modules import VAE, HierarchicalVAE
from lightning_modules.data.binarize import mix64

SEED = 3
ROWS = [(13, 13), (13, 13), (9, 4)]  # of rank 0 and rank 1: the last batch is smaller, and uneven
EPOCHS = 2
ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
BASELINES = ("none", "moving_average", "learned", "leave_one_out")
NAMES = [*sl.list_layers(), *(f"reinforce:{baseline}" for baseline in BASELINES)]


def shares():
    """The batches of each rank, ``[rank][batch]``."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(sum(rows), 1, 4, 4, generator=generator).round() for rows in ROWS]
    parts = [batch.split(rows) for batch, rows in zip(batches, ROWS, strict=True)]
    return [list(rank) for rank in zip(*parts, strict=True)]


def options(name):
    layer, _, baseline = name.partition(":")
    if baseline:
        return layer, {"latent_dim": 5, "baseline": baseline, "num_samples": 2}
    chosen = {"latent_dim": min(5, sl.registry.layer_class(layer).default_latent_dim)}
    if layer in ("vq", "rotation_trick", "residual_vq"):
        # fewer codes than rows: of two equal codes the nearest is a matter of rounding; revival is frequent
        chosen |= {"num_codes": 8, "decay": 0.5, "revive_below": 0.4}
    return layer, chosen


def build(name, cls=VAE, **extra):
    torch.manual_seed(0)
    network = {"name": "mlp", "hidden_features": [7]}
    return cls(*options(name), encoder=network, decoder=network, data_shape=(1, 4, 4), **extra)


def build_hierarchy(cls=HierarchicalVAE, **extra):
    """Two layers: one with state to agree on, below one whose KL is in closed form."""
    torch.manual_seed(0)
    network = {"name": "mlp", "hidden_features": [7]}
    layers = [{"name": "nvil", "latent_dim": 5}, {"name": "gaussian", "latent_dim": 3}]
    return cls(layers, encoder=network, decoder=network, data_shape=(1, 4, 4), **extra)


class Batches:
    """Given batches in order; a checkpoint inside an epoch knows how many were handed out."""

    def __init__(self, batches):
        self.batches, self.position, self.start = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.start = self.start % len(self), 0
        for number in range(start, len(self)):
            self.position = number + 1
            yield self.batches[number]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = self.position = state["position"]


def joined_batches():
    return [torch.cat(parts) for parts in zip(*shares(), strict=True)]


class Losses(L.Callback):
    """Keeps the loss of every batch by its number, and one draw after it."""

    def __init__(self):
        self.losses, self.noise = {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.fit_loop.epoch_loop.total_batch_idx] = float(outputs["loss"])
        self.noise.append(torch.rand(2))


class _Joined:
    """Sees joined batches and draws the noise of every rank's rows as that rank does."""

    kinds = (set(), set())

    def training_step(self, batch, batch_idx):
        seeds = [mix64(SEED, rank, 0, self.current_epoch, batch_idx) for rank in range(2)]
        with JoinedNoise(ROWS[batch_idx], seeds) as noise:
            loss = super().training_step(batch, batch_idx)
        self.kinds = (self.kinds[0] | noise.split, self.kinds[1] | noise.shared)
        return loss


class Joined(_Joined, VAE):
    pass


class JoinedHierarchy(_Joined, HierarchicalVAE):
    pass


def fit(model, batches, *, resume=None, checkpoints=None, **trainer_options):
    """Train ``model``, with a checkpoint of every step in the folder ``checkpoints``; returns losses and draws."""
    L.seed_everything(SEED, verbose=False)
    recorder = Losses()
    saving = [] if checkpoints is None else [every_step(checkpoints)]
    defaults = dict(
        devices=1,
        max_epochs=EPOCHS,
        log_every_n_steps=1000,
        enable_checkpointing=checkpoints is not None,
        callbacks=[recorder, *saving],
        use_distributed_sampler=False,
    )
    trainer = quiet_trainer(**(defaults | trainer_options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, Batches(batches), ckpt_path=resume, weights_only=True)
    return recorder


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}
