"""Training of a network around a quantiser, recomputed or not; as a script under torchrun on two processes."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stochastic_layers as sl

STEPS = 5


def trained(name, recompute, data_seed=0, wrap=lambda network: network):
    """Losses, gradients, final state and random state; ``recompute`` makes the network one that is recomputed."""
    torch.manual_seed(0)
    # few codes that die early: the rows that revive them are drawn at random, and so is what comes after
    layer = sl.create(name, latent_dim=3, code_dim=2, num_codes=6, decay=0.3, revive_below=0.4)
    network = nn.Sequential(nn.Linear(4, layer.in_features), layer, nn.Dropout(0.5), nn.Linear(layer.out_features, 5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    call = wrap(Recomputed(network, recompute))
    data, found = torch.Generator().manual_seed(data_seed), {}
    for step in range(STEPS):
        x = torch.randn(7, 4, generator=data)
        loss = (call(x) - 1).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        found |= {
            f"{key} gradient {step}": p.grad.clone() for key, p in network.named_parameters() if p.grad is not None
        }
        optimizer.step()
    return found | network.state_dict() | {"random state": torch.get_rng_state()}


class Recomputed(nn.Module):
    def __init__(self, network, recompute):
        super().__init__()
        self.network = network
        self.call = [recompute(network)]  # in a list: not another submodule

    def forward(self, x):
        return self.call[0](x)


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for recomputed in (False, True):
        recompute = (lambda network: partial(checkpoint, network, use_reentrant=False)) if recomputed else lambda n: n
        result = trained("vq", recompute, rank, partial(DistributedDataParallel, broadcast_buffers=False))
        torch.save(result, folder / f"{recomputed}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
