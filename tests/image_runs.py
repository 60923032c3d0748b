"""Small images, and a quiet trainer for models of them."""

import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset


def images(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 1, 8, 8, generator=generator) > 0.5).float()


def loader(x=None, **options):
    return DataLoader(TensorDataset(images() if x is None else x), batch_size=8, **options)


def trainer(tmp_path, **options):
    defaults = dict(log_every_n_steps=2, max_epochs=2, default_root_dir=tmp_path, num_sanity_val_steps=0)
    return quiet_trainer(**(defaults | options))
