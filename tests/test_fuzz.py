"""Anything that may come from outside is used or refused by a sentence: no crash, no hang, nothing not finite."""

import inspect
import io
import signal
import threading
import warnings
from contextlib import contextmanager, redirect_stderr

import hypothesis
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quiet_trainer import quiet_trainer

import stochastic_layers as sl
from lightning_modules import VAE
from lightning_modules.cli import CLI, require_groups
from lightning_modules.compatibility import smallest
from lightning_modules.data import ImageDataModule
from lightning_modules.data.files import read_array
from stochastic_layers.registry import layer_class

SECONDS = 20  # what one case may take before it counts as a hang
NAMES = sl.list_layers()


def amounts(quick, slow):
    """A test's numbers of cases, the large one for the slow tests."""
    return pytest.mark.parametrize("cases", [quick, pytest.param(slow, marks=pytest.mark.slow)])


@contextmanager
def no_hang():
    def ring(number, frame):
        raise AssertionError(f"one case took more than {SECONDS} s")

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(check, strategy, cases, seed):
    """Run a check on so many cases; it must return or raise a ValueError with a message."""

    @hypothesis.seed(seed)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case):
        with no_hang():
            try:
                check(case)
            except ValueError as error:
                assert len(str(error)) > 10

    run()


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from([0.5, 1.0, 1e-30, 1e300]),
    st.text(max_size=4),
    st.sampled_from(
        ["bernoulli", "categorical", "gaussian", "learned", "leave_one_out", "none", "mlp", "elbo", *NAMES]
    ),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(["name", "temperature", "class_path", "init_args", "x"]), scalars, max_size=2),
)
objects = st.sampled_from([b"a", 1j, object(), int, len, torch.tensor(1.0), torch.zeros(2), float("nan")])


# Strategies are made once: hypothesis takes longer to make one than to draw from it.
options = st.tuples(
    st.sampled_from(NAMES),
    st.integers(1, 3),
    st.sampled_from([None, None, 2, 3]),
    st.lists(st.tuples(st.integers(0, 20), values | objects), max_size=2),
)


@amounts(250, 10_000)
def test_options_of_every_layer(cases, seed):
    def check(case):
        name, latent_dim, num_categories, changes = case
        known = [*inspect.signature(layer_class(name)).parameters, "unknown"]
        given = {"latent_dim": latent_dim} | ({"num_categories": num_categories} if num_categories else {})
        layer = sl.create(name, **(given | {known[i % len(known)]: value for i, value in changes}))
        if layer.in_features < 1000 and layer.num_samples < 100:
            assert torch.isfinite(layer.eval().sample(torch.zeros(2, layer.in_features)).z).all()

    fuzz(check, options, cases, seed)


@pytest.fixture(scope="module")
def layers():
    return [smallest(name, family) for name in NAMES for family in sl.describe(name).families]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, 80.0, -80.0, 1e4, -1e4, 1e17, -1e20, 3e38, float("inf"), float("nan")]
DTYPES = [torch.float32] * 6 + [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


shapes = st.lists(st.integers(0, 3), max_size=2)
entries = st.lists(st.sampled_from(SPECIAL) | st.floats(-5, 5), min_size=1, max_size=12)
params = st.tuples(
    st.integers(0, 10**6),
    shapes,
    st.integers(0, 9),
    entries,
    st.sampled_from(DTYPES),
    st.integers(0, 20),
    st.booleans(),
)


def params_of(layer, shape, width, numbers, dtype, form):
    """Mostly tensors of the right size, else of another one, no tensors, or parts."""
    width = {0: 0, 1: 1, 2: layer.in_features + 1}.get(width, layer.in_features)
    size = torch.Size([*shape, width]).numel()
    tensor = torch.tensor((numbers * size)[:size]).reshape(*shape, width).to(dtype)
    others = [None, "params", 1.0, [1.0, 2.0], (tensor, tensor), (tensor, None), tensor.sum()]
    return others[form] if form < len(others) else tensor


@amounts(200, 10_000)
def test_params_of_every_layer_give_finite_draws_losses_and_gradients(cases, seed, layers):
    used = 0

    def check(case):
        nonlocal used
        number, shape, width, numbers, dtype, form, training = case
        layer = layers[number % len(layers)].train(training)
        params = params_of(layer, shape, width, numbers, dtype, form)
        if isinstance(params, torch.Tensor) and params.is_floating_point():
            params.requires_grad_()
        sample = layer.sample(params)
        assert torch.isfinite(sample.z).all() and not torch.isnan(sample.log_prob).any()
        if training:
            loss = sample.surrogate((sample.z.float() - 0.3).cos().sum(-1))  # a bounded cost with a bounded gradient
            assert torch.isfinite(loss).all()
            if loss.requires_grad and isinstance(params, torch.Tensor):
                (gradient,) = torch.autograd.grad(loss.sum(), params, allow_unused=True)
                assert gradient is None or torch.isfinite(gradient).all()
        used += 1

    fuzz(check, params, cases, seed)
    assert used > cases / 20  # not all was refused


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    small = {"name": "mlp", "hidden_features": [2]}
    model = VAE("reinforce", {"latent_dim": 2}, encoder=small, decoder=small, data_shape=(1, 2, 2))
    trainer = quiet_trainer(max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        trainer.fit(model, torch.utils.data.DataLoader(torch.rand(4, 1, 2, 2).round(), batch_size=2))
    path = tmp_path_factory.mktemp("fuzz") / "good.ckpt"
    trainer.save_checkpoint(path)
    VAE.load_from_checkpoint(path)
    return path


places = st.floats(0, 1, exclude_max=True)
damage = st.tuples(
    st.lists(st.tuples(places, st.integers(0, 255)), max_size=4),  # bytes replaced, anywhere
    st.lists(st.tuples(places, st.integers(0, 255)), max_size=2),  # in the pickled structure
    st.sampled_from([1.0] * 6) | st.floats(0, 1),  # truncated
    st.sampled_from([b""] * 6) | st.binary(max_size=5),  # continued
)


@amounts(40, 1_500)
def test_damaged_checkpoints(cases, seed, checkpoint):
    good = checkpoint.read_bytes()
    start = good.index(b"data.pkl")
    path = checkpoint.with_name("damaged.ckpt")

    def check(case):
        anywhere, inside, length, tail = case
        data = bytearray(good)
        for place, value in anywhere:
            data[int(place * len(data))] = value
        for place, value in inside:
            data[start + int(place * 2000)] = value
        path.write_bytes(bytes(data[: round(length * len(data))]) + tail)
        try:
            VAE.load_from_checkpoint(path)
        except ValueError as error:
            assert "needed" in str(error) or "valid names" in str(error) or "option" in str(error), error

    fuzz(check, damage, cases, seed)


@pytest.fixture(scope="module")
def parser():
    """The parser of ``fit``, made once."""
    made = []

    class Parsing(CLI):
        def parse_arguments(self, parser, args):
            made.append(self._subcommand_parsers["fit"])
            raise StopIteration

    with pytest.raises(StopIteration):
        Parsing(VAE, ImageDataModule, subclass_mode_data=True, auto_configure_optimizers=False, args=["fit"])
    return made[0]


KEYS = [
    *(
        "model",
        "model.layer",
        "model.layer_options",
        "model.encoder",
        "model.decoder",
        "model.prior",
        "model.likelihood",
    ),
    *("model.objective", "model.data_shape", "model.lr", "model.baseline_lr", "model.optimizer", "model.iwae_samples"),
    *("data", "data.class_path", "data.init_args", "trainer", "trainer.max_epochs", "trainer.callbacks"),
    *("trainer.logger", "trainer.strategy", "trainer.precision", "checkpoint", "checkpoint.monitor", "pictures"),
    *("seed_everything", "patience", "ckpt_path", "unknown"),
]
paths = st.sampled_from([{"class_path": "os.system"}, "os.path.join", {"class_path": "nowhere.Class"}, "a.b"])


@st.composite
def configurations(draw):
    config = {"data": {"class_path": "lightning_modules.data.Digits"}}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = draw(values | paths)
    return config


@pytest.mark.filterwarnings("ignore")  # jsonargparse and Lightning warn about odd values, which is right
@amounts(12, 300)
def test_configurations(cases, seed, parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = 0

    def check(config):
        nonlocal parsed
        errors = io.StringIO()
        try:
            with redirect_stderr(errors):
                namespace = parser.parse_string(yaml.safe_dump(config))
        except SystemExit as stop:  # how the command line says no
            assert stop.code == 2 and "error:" in errors.getvalue()
            return
        parsed += 1
        require_groups(namespace)

    fuzz(check, configurations(), cases, seed)
    assert parsed


@amounts(100, 3_000)
def test_texts_that_should_be_yaml_configurations(cases, seed, parser):
    words = st.sampled_from(
        ["model", "layer", ": ", "\n", "  ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!python/name:os", "'"]
    )
    texts = st.lists(words | st.text(max_size=3), max_size=12).map("".join)

    def check(text):
        errors = io.StringIO()
        try:
            with redirect_stderr(errors):
                parser.parse_string(text)
        except SystemExit as stop:
            assert stop.code == 2 and "error:" in errors.getvalue()

    fuzz(check, texts, cases, seed)


@pytest.mark.slow
def test_damaged_data_files(seed, tmp_path):
    from test_data_files import FILES, spec

    def check(case):
        number, (anywhere, _, length, tail) = case
        name = sorted(FILES)[number]
        good, array = FILES[name]
        data = bytearray(good)
        for place, value in anywhere:
            data[int(place * len(data))] = value
        (tmp_path / name).write_bytes(bytes(data[: round(length * len(data))]) + tail)
        assert read_array(tmp_path / name, spec(name)).tolist() == array.tolist()

    fuzz(check, st.tuples(st.integers(0, len(FILES) - 1), damage), 5_000, seed)
