"""What every test and doctest runs under: one thread, its own seeded random numbers, the data folder by option."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Set before anything that reads them is imported: no window, no network.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stochastic layers")
    group.addoption("--seed", type=int, default=0, help="seed of every test (default 0)")
    group.addoption(
        "--data",
        default=os.environ.get("STOCHASTIC_LAYERS_DATA"),
        help="folder of the data sets (default: the environment variable STOCHASTIC_LAYERS_DATA)",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the numbers do not depend on the machine, and workers do not fight for cores


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')}, torch: {torch.__version__}, data: {config.getoption('--data')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, for tests that hand one on."""
    value: int = request.config.getoption("--seed")
    return value


@pytest.fixture(autouse=True)
def random_numbers(seed: int) -> Iterator[None]:
    """Seed torch for one test and leave its generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@pytest.fixture
def data_root(request: pytest.FixtureRequest) -> Path:
    """The folder of the data sets; a test that asks for it is skipped where there is none."""
    path = request.config.getoption("--data")
    if not path:
        pytest.skip("needs data sets: set STOCHASTIC_LAYERS_DATA or pass --data FOLDER")
    root = Path(path)
    if not root.is_dir():
        pytest.fail(f"needed a folder of data sets, got {path!r}; correct STOCHASTIC_LAYERS_DATA or --data")
    return root
