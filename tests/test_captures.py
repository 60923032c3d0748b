"""What ``capture`` collects: from the innermost, from one thread and one task, and nothing after its end."""

import asyncio
import threading

import pytest
import torch

import stochastic_layers as sl

SIZE = 2  # bits of each layer


def bits(name, **options):
    return sl.create(name, latent_dim=SIZE, **options).double()


def test_a_layer_that_needs_the_cost_refuses_to_run_outside_capture_in_training_only():
    layer, logits = bits("disarm"), torch.zeros(5, SIZE, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"outside sl\.capture\(\)"):
        layer(logits)
    with torch.no_grad():
        assert layer(logits).shape == (2, 5, SIZE)
    assert layer.eval()(logits).shape == (2, 5, SIZE)
    layer.train()
    with sl.capture():
        layer(logits)
    with pytest.raises(RuntimeError, match=r"outside sl\.capture\(\)"):  # the capture has ended
        layer(logits)


def test_nested_captures_collect_for_the_innermost():
    layer = bits("reinforce")
    with sl.capture() as outer:
        layer(torch.zeros(3, SIZE))
        with sl.capture() as inner:
            layer(torch.zeros(4, SIZE))
        layer(torch.zeros(5, SIZE))
    assert [s.z.shape[1] for s in outer] == [3, 5] and [s.z.shape[1] for s in inner] == [4]


@pytest.mark.parametrize("options", [{}, {"family": "categorical", "num_categories": 3}], ids=str)
@pytest.mark.parametrize("name", ["reinforce", "local_expectation", "double_cv", "rebar", "straight_through"])
def test_a_layer_that_drew_without_gradients_does_not_train_the_encoder(name, options):
    """Whatever the surrogate, computed with gradients on, could still reach."""
    layer = bits(name, **options)
    logits = torch.zeros(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(layer.out_features, dtype=torch.float64, requires_grad=True)
    with sl.capture() as samples, torch.no_grad():
        z = layer(logits)
    loss = sl.surrogate((z * weight).sum(-1) ** 2, samples)
    of_logits, of_weight = torch.autograd.grad(loss.sum(), [logits, weight], allow_unused=True)
    assert of_logits is None and of_weight.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leave_one_out", {}),
        ("nvil", {"family": "gaussian"}),
        ("relax", {}),
        ("sum_and_sample", {"num_exact": 1}),
        ("unordered_set", {"num_samples": 2}),
        ("carms", {"num_categories": 3}),
    ],
    ids=str,
)
def test_draws_that_the_model_changes_in_place_are_refused(name, options):
    """log q would be that of other points, in silence: autograd guards only what it has saved."""
    layer = bits(name, **options)
    logits = torch.zeros(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    with sl.capture() as samples:
        z = layer(logits)
    cost = z.mul_(2).sub_(1).sum(-1)
    with pytest.raises(RuntimeError, match="changed in place"):
        sl.surrogate(cost, samples)


def test_an_exception_leaves_no_capture_open():
    layer = bits("reinforce")
    with sl.capture() as outer:
        with pytest.raises(ZeroDivisionError), sl.capture() as inner:
            layer(torch.zeros(4, SIZE))
            raise ZeroDivisionError
        layer(torch.zeros(3, SIZE))
    assert len(inner) == 1 and len(outer) == 1
    with pytest.raises(ZeroDivisionError), sl.capture():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="outside"):
        layer(torch.zeros(3, SIZE))


def test_threads_do_not_see_each_others_captures():
    layer = bits("reinforce")
    barrier = threading.Barrier(4, timeout=60)
    seen, refused = {}, []

    def work(index):
        with sl.capture() as samples:
            for _ in range(5):
                barrier.wait()  # all threads hold an open capture
                layer(torch.zeros(index + 1, SIZE))
            barrier.wait()
        seen[index] = [s.z.shape[1] for s in samples]

    def work_outside():
        try:
            layer(torch.zeros(9, SIZE))
        except RuntimeError as error:
            refused.append(str(error))

    with sl.capture() as mine:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stranger = threading.Thread(target=work_outside)
        stranger.start()
        stranger.join(60)
    assert mine == [] and seen == {i: [i + 1] * 5 for i in range(4)}
    assert len(refused) == 1 and "outside" in refused[0]


def test_tasks_do_not_see_each_others_captures():
    layer = bits("reinforce")

    async def work(index):
        with sl.capture() as samples:
            for _ in range(5):
                await asyncio.sleep(0)  # the other tasks open theirs, draw and go on
                layer(torch.zeros(index + 1, SIZE))
        with pytest.raises(RuntimeError, match="outside"):
            layer(torch.zeros(1, SIZE))
        return [s.z.shape[1] for s in samples]

    async def main():
        return await asyncio.gather(*[work(i) for i in range(4)])

    assert asyncio.run(main()) == [[i + 1] * 5 for i in range(4)]
