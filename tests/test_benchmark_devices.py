"""The option ``--device`` of the benchmarks: where models and batches go, and what is said where there is no GPU.

Tensors on torch's device "meta" have no numbers and refuse to meet those of another device, as a GPU's do.
"""

import importlib
import logging
import sys

import pytest
import torch

pytest.importorskip("benchmarks", reason="a release does not hold the benchmarks")

from benchmarks import measure, monitor_overhead, training, variance

TIMED = ["bandwidth", "estimators", "layers", "memory", "monitor_overhead", "scaling", "training", "variance"]


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", [*TIMED, "evidence.million_steps"])
def test_a_missing_gpu_is_said_in_one_sentence_before_anything_is_measured(
    name, without_gpu, monkeypatch, tmp_path, capsys
):
    folder = "--out" if name.startswith("evidence") else "--folder"
    monkeypatch.setattr(sys, "argv", [name, "--device", "cuda", folder, str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: needed a GPU for --device cuda, got" in last
    assert not list(tmp_path.iterdir())


class Watched(training.Bare):
    """Remembers where its parameters and batches were."""

    seen: set

    def forward(self, x):
        self.seen |= {x.device.type, *(p.device.type for p in self.parameters())}
        return super().forward(x)


@pytest.fixture
def clocks(monkeypatch):
    """Short loops; the devices whose clocks were read."""
    read = []
    monkeypatch.setattr(training, "STEPS", 2)
    monkeypatch.setattr(training, "WARM_UP", 1)
    monkeypatch.setattr(training, "clock", lambda device: read.append(device) or float(len(read)))
    return read


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batches", [training.loaded, training.indexed])
def test_the_loop_trains_where_it_is_asked_to(batches, device, clocks):
    Watched.seen = set()
    pixels = torch.rand(3 * training.BATCH, 1, 28, 28)
    assert training.loop(pixels, batches, device, Watched) == 0.5
    assert Watched.seen == {device} and clocks == [device] * 2


def test_a_batch_left_on_the_host_is_seen(clocks):
    pixels = torch.rand(3 * training.BATCH, 1, 28, 28)
    with pytest.raises(RuntimeError, match="device"):
        training.loop(pixels, lambda pixels, device: training.loaded(pixels, "cpu"), "meta")


class Begun(Exception):
    pass


@pytest.fixture
def trainers(monkeypatch):
    """The options of the Trainers that were built; none trains."""
    built = []

    class Trainer:
        def __init__(self, **options):
            built.append(options)

        def fit(self, *args, **options):
            raise Begun

    monkeypatch.setattr(training.L, "Trainer", Trainer)
    return built


@pytest.mark.parametrize(("device", "accelerator"), [("cpu", "cpu"), ("cuda", "gpu")])
@pytest.mark.parametrize(
    "begin",
    [
        lambda device: training.trained(training.Usual(), None, device),
        lambda device: monitor_overhead.measure("", monitor_overhead.MODELS["digits, batch 64"], "default", 1, device),
        lambda device: variance.trained("gaussian", device),
    ],
    ids=["training", "monitor_overhead", "variance"],
)
def test_the_trainer_is_given_the_device(begin, device, accelerator, trainers):
    with pytest.raises(Begun):
        begin(device)
    (options,) = trainers
    assert options["accelerator"] == accelerator and options["devices"] == 1
    assert all(callback.device == device for callback in options.get("callbacks", [])[:1])  # the one that times


def test_the_stopwatch_reads_the_clock_of_the_device(clocks):
    watch = training.Stopwatch("cuda")
    for step in range(training.WARM_UP + training.STEPS + 1):
        watch.on_train_batch_start(None, None, None, step)
    assert clocks == ["cuda", "cuda"] and watch.seconds == 0.5


@pytest.fixture
def logs():
    """What main() sets for its process."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def test_every_case_of_training_and_its_record_follow_the_option(monkeypatch, tmp_path, logs):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["training", "--device", "cuda", "--seconds", "0", "--folder", str(tmp_path)])
    monkeypatch.setattr(training, "EXAMPLES", 2)
    asked, written = [], []
    monkeypatch.setattr(training, "loop", lambda pixels, batches, device, *rest, **options: asked.append(device) or 1.0)
    monkeypatch.setattr(training, "trained", lambda module, data, device, *rest: asked.append(device) or 1.0)
    monkeypatch.setattr(training, "svi", lambda pixels, device: asked.append(device) or 1.0)
    monkeypatch.setattr(training, "write", lambda *args, **options: written.append(options["device"]))
    training.main()
    assert len(asked) >= 7 * 5 and set(asked) == {"cuda"} and written == ["cuda"]


def test_a_gpu_is_timed_by_the_wall_after_it_has_finished(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 5.0)
    assert measure.clock("cuda") == 5.0 and waited
    assert measure.clock("cpu") != 5.0 and len(waited) == 1
