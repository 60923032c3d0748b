"""Codebooks on two processes: equal on all ranks, and equal to one process that sees the joined batch."""

import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import spawn_two

import stochastic_layers as sl

pytestmark = pytest.mark.ddp

OPTIONS = {
    "vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 12, "decay": 0.5, "revive_below": 0.4},
    "residual_vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 6, "depth": 2, "decay": 0.5, "revive_below": 0.4},
    "lfq": {"latent_dim": 2, "code_dim": 3, "entropy_weight": 0.5},
}
STEPS = 6


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(24, 6, generator=generator, dtype=torch.float64) + 0.2 * step for step in range(STEPS)]


def train(name, shares, seed):
    """State after each step, and the gradient of the mean loss in the last one."""
    torch.manual_seed(1)
    layer = sl.create(name, **OPTIONS[name]).double()
    torch.manual_seed(seed)  # the ranks draw different noise
    states = []
    for share in shares:
        params = share.clone().requires_grad_()
        sample = layer.sample(params)
        loss = sample.surrogate(sample.z.square().sum(-1)).mean()
        states.append({k: v.clone() for k, v in layer.state_dict().items()})
    (gradient,) = torch.autograd.grad(loss, params)
    return states, gradient


def work(rank, size, folder, names, split):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        torch.set_num_threads(1)
        shares = [b[:split] if rank == 0 else b[split:] for b in batches()]
        results = {name: train(name, shares, seed=7 if rank == 0 else 99) for name in names}
        torch.save(results, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(folder, names, split):
    spawn_two(work, 2, str(folder), names, split)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", [20, 24], ids=["uneven", "one_rank_is_empty"])
def test_codebooks_of_two_ranks_agree_and_equal_one_process_on_the_joined_batch(split, tmp_path):
    first, second = run(tmp_path, ("vq", "residual_vq"), split)
    for name in ("vq", "residual_vq"):
        (states, _), (other, _) = first[name], second[name]
        alone, _ = train(name, batches(), seed=7)
        for step in range(STEPS):
            for key, value in states[step].items():
                assert torch.equal(value, other[step][key]), (step, key)
                torch.testing.assert_close(value, alone[step][key], msg=lambda m, at=(step, key): f"{at}: {m}")
        assert any(not torch.equal(states[0][k], states[-1][k]) for k in states[0])
    rows = torch.cat(batches()[1:]).view(-1, 3)
    codes = torch.cat([state["codes.vectors"] for state in first["vq"][0][1:]])
    assert (codes.unsqueeze(1) == rows).all(-1).any()  # some code was revived, so that the random choice was tested
    assert multiprocessing.active_children() == []


def test_gradients_of_the_entropy_averaged_over_ranks_are_those_of_the_joined_batch(tmp_path):
    (_, first), (_, second) = (result["lfq"] for result in run(tmp_path, ("lfq",), 12))
    _, alone = train("lfq", batches(), seed=7)
    # each rank's loss is a mean over half the rows; averaging the ranks halves its gradient
    torch.testing.assert_close(torch.cat([first, second]) / 2, alone)
