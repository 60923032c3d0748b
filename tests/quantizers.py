"""Small layers of every quantiser, embeddings for them, and data in four blobs."""

import torch

import stochastic_layers as sl

SMALL = {
    "vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
    "rotation_trick": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
    "residual_vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7, "depth": 3},
    "fsq": {"latent_dim": 2, "levels": (4, 3, 5)},
    "lfq": {"latent_dim": 2, "code_dim": 3},
    "bsq": {"latent_dim": 2, "code_dim": 3},
    "simvq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
    "diveq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
}
NAMES = sorted(SMALL)
LEARNED = ("vq", "rotation_trick", "residual_vq", "diveq")


def build(name, **options):
    return sl.create(name, **{**SMALL[name], **options}).double()


def embeddings(layer, *batch):
    return torch.randn(*batch, layer.in_features, dtype=torch.float64)


def blobs(n=40, spread=0.05):
    centers = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0], [3.0, 3.0]], dtype=torch.float64)
    return centers, (centers.repeat_interleave(n, 0) + spread * torch.randn(5 * n, 2, dtype=torch.float64))
