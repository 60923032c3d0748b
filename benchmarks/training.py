"""What does training under Lightning cost? Decides what is logged, seeded and measured by default.

A VAE 784-400-20-400-784 on binarized 28x28 images, batch 128, is trained by a loop written out in PyTorch and by
``VAE`` under a ``Trainer``, by turns, some hundred steps at a time. Counted is the time of a step with its data, after
a warm-up; what a Trainer does once, before and after, is left out. Pyro comes with its own loop, ``SVI``. Of pythae it
is the model alone, in the loop with torch's default Adam, and not its trainer. The images are in the memory of the
host, as they are for a Trainer; on a GPU each batch is moved there. ::

    python -m benchmarks.training
"""

from __future__ import annotations

import importlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Row, accelerator, arguments, clock, summary, write
from lightning_modules import VAE, GradientVarianceMonitor
from lightning_modules.data import TensorData

STEPS, WARM_UP, BATCH = 150, 30, 128
EXAMPLES = BATCH * (STEPS + WARM_UP + 2)
REFERENCE = "loop, same optimizer"


class Bare(nn.Module):
    """The model, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = networks()

    def forward(self, x: Tensor) -> Tensor:
        """The loss of a batch ``[B, 1, 28, 28]``."""
        loc, log_variance = self.encoder(x).chunk(2, -1)
        z = loc + (0.5 * log_variance).exp() * torch.randn_like(loc)
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").flatten(1).sum(-1)
        kl = -0.5 * (1 + log_variance - loc.square() - log_variance.exp()).sum(-1)
        return (reconstruction + kl).mean()


def networks() -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
    decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Unflatten(-1, (1, 28, 28)))
    return encoder, decoder


def loaded(pixels: Tensor, device: str) -> Iterator[Tensor]:
    """Batches as most scripts make them."""
    for (x,) in DataLoader(TensorDataset(pixels), batch_size=BATCH, shuffle=True):
        yield torch.bernoulli(x.to(device))


def indexed(pixels: Tensor, device: str) -> Iterator[Tensor]:
    """Batches by one index into one tensor, as the data modules here make them."""
    for rows in torch.randperm(len(pixels)).split(BATCH):
        yield torch.bernoulli(pixels[rows]).to(device)


def seconds_of_a_step(step: Callable[[Tensor], object], batches: Iterator[Tensor], device: str) -> float:
    """Mean time of a step and of the making of its batch, after the warm-up."""
    for x in islice(batches, WARM_UP):
        step(x)
    start = clock(device)
    for x in islice(batches, STEPS):
        step(x)
    return (clock(device) - start) / STEPS


def loop(
    pixels: Tensor,
    batches: Callable[[Tensor, str], Iterator[Tensor]],
    device: str,
    build: Callable[[], nn.Module] = Bare,
    **options: Any,
) -> float:
    """Seconds of a step of a loop written out, for a model whose result is its loss."""
    model = build().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **options)

    def step(x: Tensor) -> None:
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return seconds_of_a_step(step, batches(pixels, device), device)


def pythae() -> nn.Module:
    """The same networks, likelihood and KL in pythae's ``VAE``, which is called as its own trainer does.

    Its reconstruction loss ``"bce"`` takes probabilities where the others take logits. So its decoder ends in a
    sigmoid, and the loss is ``F.binary_cross_entropy``, which cuts logarithms at -100. Number and gradient are those
    from logits, but where a probability rounds to 0 or 1.
    """
    models, parts = importlib.import_module("pythae.models"), importlib.import_module("pythae.models.nn")
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput

    class Encoder(parts.BaseEncoder):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.network(x).chunk(2, -1)
            return output(embedding=loc, log_covariance=log_variance)

    class Decoder(parts.BaseDecoder):  # type: ignore[name-defined, misc]
        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=self.network(z).sigmoid())

    class Loss(models.VAE):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor) -> Any:
            return super().forward({"data": x}).loss

    encoder, decoder = Encoder(), Decoder()
    encoder.network, decoder.network = networks()
    config = models.VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce")
    model: nn.Module = Loss(config, encoder=encoder, decoder=decoder)
    return model


def svi(pixels: Tensor, device: str) -> float:
    """Seconds of a step of Pyro's SVI with its own Adam."""
    pyro = importlib.import_module("pyro")
    dist, infer = importlib.import_module("pyro.distributions"), importlib.import_module("pyro.infer")
    pyro.clear_param_store()
    bare = Bare().to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", bare.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 20), x.new_ones(len(x), 20)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=bare.decoder(z), validate_args=False).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", bare.encoder)
        with pyro.plate("data", len(x)):
            loc, log_variance = bare.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1))

    optimizer = importlib.import_module("pyro.optim").Adam({"lr": 1e-3})
    trainer = infer.SVI(model, guide, optimizer, loss=infer.TraceMeanField_ELBO())
    return seconds_of_a_step(trainer.step, loaded(pixels, device), device)


class Stopwatch(L.Callback):
    """Times the steps after the warm-up, with their data and all that the Trainer does in between."""

    def __init__(self, device: str) -> None:
        self.device = device

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.start = clock(self.device)
        if batch_idx == WARM_UP + STEPS:
            self.seconds = (clock(self.device) - self.start) / STEPS


class Usual(L.LightningModule):
    """The model as a LightningModule that logs three values at every step, as most do, or none."""

    def __init__(self, logs: bool = True) -> None:
        super().__init__()
        self.model = Bare()
        self.logs = logs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch[0])
        if self.logs:
            self.log_dict({"elbo": -loss, "kl": loss.detach(), "reconstruction": loss.detach()})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def trained(module: L.LightningModule, data: TensorData, device: str, *callbacks: L.Callback) -> float:
    """Seconds of a step under a Trainer."""
    watch = Stopwatch(device)
    trainer = L.Trainer(
        accelerator=accelerator(device),
        devices=1,
        max_steps=WARM_UP + STEPS + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *callbacks],
    )
    trainer.fit(module, data)
    return watch.seconds


def vae() -> VAE:
    """The library's model, of the same networks."""
    encoder, decoder = networks()
    return VAE("gaussian", {"latent_dim": 20}, encoder=encoder, decoder=decoder, data_shape=(1, 28, 28))


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__ or "", seconds=120.0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = options.device
    pixels = torch.rand(EXAMPLES, 1, 28, 28)
    data = TensorData(pixels, batch_size=BATCH, binarization="dynamic")
    cases: dict[str, Callable[[], float]] = {
        REFERENCE: lambda: loop(pixels, loaded, device, fused=True),
        "loop, torch's default Adam": lambda: loop(pixels, loaded, device),
        "loop, same optimizer, indexed tensor": lambda: loop(pixels, indexed, device, fused=True),
        "VAE under Trainer": lambda: trained(vae(), data, device),
        "VAE under Trainer, no monitor": lambda: trained(vae(), data, device, GradientVarianceMonitor(every_n_steps=0)),
        "LightningModule that logs each step": lambda: trained(Usual(), data, device),
        "LightningModule that logs nothing": lambda: trained(Usual(logs=False), data, device),
    }
    others: dict[str, tuple[str, Callable[[], float]]] = {
        "Pyro SVI": ("pyro", lambda: svi(pixels, device)),
        "loop, torch's default Adam, pythae's model": ("pythae.models", lambda: loop(pixels, loaded, device, pythae)),
    }
    unavailable = {}
    for name, (package, case) in others.items():
        try:
            importlib.import_module(package)
            cases[name] = case
        except ImportError as error:
            unavailable[name] = f"ImportError: {error}"
    times: dict[str, list[float]] = {name: [] for name in cases}
    order, end = list(cases), time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(times[REFERENCE]) < 5:
        for name in order:
            times[name].append(cases[name]())
        order.reverse()
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[REFERENCE], strict=True)]
        group = f"VAE 784-400-20, batch {BATCH}"
        rows.append(Row(group, name, "s", *summary(values), len(values), REFERENCE, *summary(ratios)))
        print(f"{name:40s} {1e3 * rows[-1].median:7.2f} ms  {rows[-1].ratio:.3f} x {REFERENCE}", flush=True)
    usual = [a / b for a, b in zip(times["VAE under Trainer"], times["loop, torch's default Adam"], strict=True)]
    findings = {"VAE under Trainer, times the loop with torch's default Adam": round(statistics.median(usual), 3)}
    print(findings)
    more = {"device": device, "unavailable": unavailable, "findings": findings, "folder": options.folder}
    write("training", (__doc__ or "").splitlines()[0], rows, **more)


if __name__ == "__main__":
    main()
