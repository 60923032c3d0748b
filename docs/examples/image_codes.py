"""Turn images into a few integers, learn which integers go together, and draw new images.

The two stages of image tokenisers, on 8x8 digits: a VAE with a quantised latent under a Lightning Trainer, whose four
code vectors for a digit are integers; then a recurrent network that predicts each integer from those before it. Its
draws, decoded, are new digits. Codes drawn independently of each other show what the second stage is for::

    python docs/examples/image_codes.py --layer vq fsq
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from lightning_modules import VAE
from lightning_modules.data import Digits

POSITIONS = 4
LAYERS = {
    "vq": {"code_dim": 8, "num_codes": 64},
    "rotation_trick": {"code_dim": 8, "num_codes": 64},
    "simvq": {"code_dim": 8, "num_codes": 64},
    "fsq": {"levels": [4, 4, 4]},
}


def tokeniser(name, data, epochs):
    """Stage one: a trained VAE."""
    model = VAE(name, {"latent_dim": POSITIONS, **LAYERS[name]}, likelihood="gaussian", encoder="conv", decoder="conv")
    trainer = L.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )
    trainer.fit(model, data)
    return model.eval()


class Prior(nn.Module):
    """Stage two: a law of the integers ``[B, POSITIONS]``, each given those before it."""

    def __init__(self, num_codes):
        super().__init__()
        self.embedding = nn.Embedding(num_codes + 1, 32)  # the last one starts a sequence
        self.network, self.head = nn.GRU(32, 64, batch_first=True), nn.Linear(64, num_codes)
        self.start = num_codes

    def forward(self, codes):
        before = F.pad(codes[:, :-1], (1, 0), value=self.start)
        return self.head(self.network(self.embedding(before))[0])  # logits [B, POSITIONS, num_codes]

    def nats(self, codes):
        """-log p of each row, averaged."""
        logits = self(codes)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten()) * codes.shape[1]

    @torch.no_grad()
    def sample(self, count):
        codes = torch.zeros(count, POSITIONS, dtype=torch.long)
        for position in range(POSITIONS):
            codes[:, position] = torch.distributions.Categorical(logits=self(codes)[:, position]).sample()
        return codes


def learn_prior(codes, held_out, num_codes, steps):
    """The prior where it predicts held-out codes best, and how well it does."""
    prior = Prior(num_codes)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.1)
    best, state = float("inf"), prior.state_dict()
    for step in range(steps):
        loss = prior.nats(codes[torch.randint(len(codes), (256,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            with torch.no_grad():
                nats = float(prior.nats(held_out))
            if nats < best:
                best, state = nats, {k: v.clone() for k, v in prior.state_dict().items()}
    prior.load_state_dict(state)
    return prior, best


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="+", default=["vq", "fsq"], choices=LAYERS, metavar="L")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--prior-steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    data = Digits()
    data.setup()
    arrays = data.load()
    train, test = arrays.train_pixels / 16, arrays.test_pixels / 16
    table = Table("layer", "variance lost", "codes in use", "nats, uniform", "nats, independent", "nats, prior")
    rows = []
    for name in options.layer:
        L.seed_everything(0, verbose=False)
        model = tokeniser(name, data, options.epochs)
        with torch.no_grad():
            params = model.encode(test)
            codes, held_out = model.layer.indices(model.encode(train)), model.layer.indices(params)
            lost = (model(test) - test).square().mean() / (test - train.mean(0)).square().mean()
            in_use = float(model.layer.perplexity(params))
        num_codes = int(codes.max()) + 1 if name == "fsq" else LAYERS[name]["num_codes"]
        num_codes = max(num_codes, int(held_out.max()) + 1)
        counts = F.one_hot(codes, num_codes).sum(0) + 0.5  # [POSITIONS, num_codes]
        frequencies = counts / counts.sum(-1, keepdim=True)
        independent = -frequencies.log()[torch.arange(POSITIONS), held_out].sum(-1).mean()
        prior, nats = learn_prior(codes, held_out, num_codes, options.prior_steps)
        uniform = POSITIONS * torch.tensor(float(num_codes)).log()
        table.add_row(
            name, f"{100 * lost:.0f} %", f"{in_use:.0f}", f"{uniform:.1f}", f"{independent:.1f}", f"{nats:.1f}"
        )
        shuffled = torch.stack([frequencies[p].multinomial(12, replacement=True) for p in range(POSITIONS)], -1)
        with torch.no_grad():
            pictures = [model(test[:12]), *(model.likelihood.mean(model.decode(model.layer.decode(c)))
                                            for c in (shuffled, prior.sample(12)))]  # fmt: skip
        rows += [(f"{name}: {what}", p) for what, p in zip(("decoded", "independent", "prior"), pictures, strict=True)]
    figure, panels = plt.subplots(1 + len(rows), 12, figsize=(12, 1.05 * (1 + len(rows))))
    for line, (title, pictures) in zip(panels, [("test images", test[:12]), *rows], strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        for axes, image in zip(line, pictures, strict=True):
            axes.imshow(image.squeeze(0).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "image_codes.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
