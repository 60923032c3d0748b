"""Noise: different on each rank, the same after resuming, undisturbed by evaluation."""

import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import processes
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stochastic_layers as sl
from lightning_modules import ReproducibleNoise
from lightning_modules.data.binarize import mix64


class Own(L.LightningModule):
    """Somebody's own module around a layer; keeps what it drew."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.layer = sl.create("reinforce", latent_dim=4, num_samples=2, baseline="moving_average")
        self.drawn, self.validated, self.losses = [], [], []

    def training_step(self, batch, batch_idx):
        sample = self.layer.sample(self.net(batch[0]))
        self.drawn.append(sample.z.detach().clone())
        loss = sample.surrogate(sample.z.sum(-1) ** 2 + batch[0].sum(-1)).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.layer.sample(torch.zeros(len(batch[0]), 4)).z)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(tmp_path, *, val=True, seed=0, noise=True, ckpt=None, model=None, shuffle=False, **options):
    L.seed_everything(seed, verbose=False)
    model = model or Own()
    examples = TensorDataset(torch.arange(36.0).view(12, 3) / 36)
    training, data = DataLoader(examples, batch_size=3, shuffle=shuffle), DataLoader(examples, batch_size=3)
    trainer = quiet_trainer(
        default_root_dir=tmp_path,
        callbacks=[ReproducibleNoise()] if noise else [],
        num_sanity_val_steps=2 if val else 0,
        limit_val_batches=1.0 if val else 0,
        **({"max_epochs": 3} | options),
    )
    trainer.fit(model, training, data, ckpt_path=ckpt)
    return trainer, model


@pytest.mark.parametrize("shuffle", [False, True])
def test_validation_neither_moves_training_noise_or_order_nor_changes_its_own(shuffle, tmp_path):
    _, with_validation = run(tmp_path, shuffle=shuffle)
    _, without = run(tmp_path, val=False, shuffle=shuffle)
    assert all(torch.equal(a, b) for a, b in zip(with_validation.drawn, without.drawn, strict=True))
    epochs = [torch.stack(with_validation.validated[2 + 4 * e : 6 + 4 * e]) for e in range(3)]
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[1], epochs[2])


def test_control_without_the_callback_validation_moves_the_noise(tmp_path):
    _, with_validation = run(tmp_path, noise=False)
    _, without = run(tmp_path, val=False, noise=False)
    assert not all(torch.equal(a, b) for a, b in zip(with_validation.drawn, without.drawn, strict=True))


def test_batches_and_epochs_draw_different_noise(tmp_path):
    _, model = run(tmp_path)
    fresh = [d for d in model.drawn]
    assert not torch.equal(fresh[0], fresh[4])
    _, other = run(tmp_path, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(fresh, other.drawn, strict=True))


def test_a_resumed_run_repeats_the_undisturbed_one_bit_for_bit(tmp_path):
    _, whole = run(tmp_path)
    trainer, first = run(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Own()
    run(tmp_path, seed=99, ckpt=tmp_path / "one.ckpt", model=resumed)  # another seed: the checkpoint's is used
    assert first.losses + resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))


def trainer_of(rank, epoch=0):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(global_rank=rank, current_epoch=epoch, strategy=strategy)


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_evaluation_leaves_the_random_state_as_it_was(stage):
    noise, before = ReproducibleNoise(seed=5), torch.get_rng_state()
    getattr(noise, f"on_{stage}_start")(trainer_of(0), None)
    getattr(noise, f"on_{stage}_batch_start")(trainer_of(0), None, None, 0)
    assert not torch.equal(torch.get_rng_state(), before)
    getattr(noise, f"on_{stage}_end")(trainer_of(0), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_draw_different_noise_unless_it_is_shared():
    def draw(rank, mode, epoch=0, batch=0):
        ReproducibleNoise(seed=5, mode=mode).on_train_batch_start(trainer_of(rank, epoch), None, None, batch)
        return torch.rand(4)

    def order(rank, epoch):
        ReproducibleNoise(seed=5).on_train_epoch_start(trainer_of(rank, epoch), None)
        return torch.rand(4)

    assert not torch.equal(draw(0, "per_rank"), draw(1, "per_rank"))
    assert torch.equal(draw(1, "per_rank"), draw(1, "per_rank"))
    assert torch.equal(draw(0, "shared"), draw(1, "shared"))
    assert not torch.equal(draw(0, "shared"), draw(0, "shared", epoch=1))
    assert not torch.equal(draw(0, "shared"), draw(0, "shared", batch=1))
    assert torch.equal(order(0, 1), order(1, 1)) and not torch.equal(order(0, 0), order(0, 1))
    with pytest.raises(ValueError, match="needed mode"):
        ReproducibleNoise(mode="per_host")


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("strategy", "mode"), [("ddp_fork", "per_rank"), ("ddp_fork", "shared"), ("ddp_spawn", "per_rank")]
)
def test_processes_that_begin_with_the_same_random_state_draw_different_noise(strategy, mode, tmp_path):
    worker = Path(__file__).with_name("spawned_worker.py")
    status, output = processes.run([sys.executable, str(worker), str(tmp_path), strategy, mode], timeout=200)
    assert status == 0, output[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert bool((first["noise"] == second["noise"]).any()) == (mode == "shared")


def test_seeds_of_neighbouring_positions_do_not_collide():
    seeds = {
        mix64(s, r, stage, e, b)
        for s in range(3)
        for r in range(4)
        for stage in range(4)
        for e in range(8)
        for b in range(64)
    }
    assert len(seeds) == 3 * 4 * 4 * 8 * 64


def test_the_random_state_is_given_back_when_validation_fails(tmp_path):
    class Failing(Own):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("validation broke")

    L.seed_everything(0, verbose=False)
    with pytest.raises(RuntimeError, match="validation broke"):
        run(tmp_path, model=Failing())
