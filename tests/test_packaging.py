"""What an installation brings, and what importing it does not do."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import pytest

import stochastic_layers

ROOT = Path(__file__).parents[1]
PACKAGES = ("stochastic_layers", "lightning_modules")

IMPORT_PULLS_IN_NO = """
import sys
import torch
before = set(sys.modules)
import stochastic_layers
heavy = {"lightning", "pytorch_lightning", "wandb", "torchmetrics", "matplotlib", "jsonargparse", "rich", "scipy",
         "pandas", "tensorboard", "lightning_modules"}
pulled_in = sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before})
assert not pulled_in, pulled_in
"""

IMPORT_CHANGES_NOTHING = """
import logging, random, sys, warnings
import torch
from torch.distributions import Distribution

{prepare}

def state():
    loggers = logging.Logger.manager.loggerDict
    return {{
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "validate_args": Distribution._validate_args,
        "torch generator": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "warning filters": list(warnings.filters),
        "root handlers": list(logging.root.handlers),
        "root level": logging.root.level,
        "own loggers": [name for name in loggers if name.startswith(("stochastic_layers", "lightning_modules"))],
        "excepthook": sys.excepthook,
    }}

before = state()
import {package}
after = state()
changed = [key for key in before if before[key] != after[key]]
assert not changed, changed
"""


def run_python(code: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_callback_is_put_into_the_trainers_of_others():
    assert "callbacks_factory" not in (ROOT / "pyproject.toml").read_text()


def test_importing_the_layers_pulls_in_torch_and_nothing_else_of_weight():
    run_python(IMPORT_PULLS_IN_NO)


def test_importing_the_layers_changes_no_global_state():
    run_python(IMPORT_CHANGES_NOTHING.format(package="stochastic_layers", prepare=""))


def test_importing_the_lightning_modules_changes_no_global_state():
    # what Lightning itself does at its import is not ours
    prepare = "import lightning, lightning.pytorch.cli, torchmetrics, wandb, rich, matplotlib.pyplot"
    run_python(IMPORT_CHANGES_NOTHING.format(package="lightning_modules", prepare=prepare))


def test_the_check_of_global_state_sees_a_change():
    with pytest.raises(AssertionError, match="default dtype"):
        run_python(
            IMPORT_CHANGES_NOTHING.format(package="this", prepare="").replace(
                "import this", "torch.set_default_dtype(torch.float64)"
            )
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_tells_type_checkers_that_it_is_typed(package):
    assert files(package).joinpath("py.typed").is_file()


def test_version_is_the_one_of_the_citation_file_and_of_the_installed_distribution():
    assert f"\nversion: {stochastic_layers.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    try:
        installed = version("stochastic-layers")
    except PackageNotFoundError:
        pytest.skip("the distribution is not installed: pip install -e .")
    assert installed == stochastic_layers.__version__, "install again: pip install -e ."


def source_files(package: str) -> set[str]:
    """The files of a package, caches left out, as paths from the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[set[str], set[str]]:
    """The file lists of a fresh wheel and a fresh sdist; built without isolation, so that nothing is downloaded."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)  # the wheel is built from the sdist
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    return in_wheel, in_sdist


@pytest.mark.slow
def test_the_wheel_holds_both_packages_whole_and_nothing_else(distributions):
    in_wheel, _ = distributions
    installed = {name for name in in_wheel if ".dist-info/" not in name}
    assert installed == set().union(*map(source_files, PACKAGES))
    assert {f"{package}/py.typed" for package in PACKAGES} <= installed
    assert not [name for name in installed if Path(name).name.startswith(("test_", "conftest"))]
    metadata = {name.partition(".dist-info/")[2] for name in in_wheel - installed}
    assert metadata == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


@pytest.mark.slow
def test_the_sdist_holds_what_builds_and_tests_a_release_and_nothing_else(distributions):
    _, in_sdist = distributions
    assert set().union(*map(source_files, (*PACKAGES, "tests"))) <= in_sdist
    top = {name for name in in_sdist if "/" not in name}
    assert top == {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "Makefile",
        "PKG-INFO",
        "README.md",
        "conftest.py",
        "constraints-oldest.txt",
        "constraints.txt",
        "pyproject.toml",
    } | ({".gitignore"} & top)
    assert {name.partition("/")[0] for name in in_sdist - top} == {*PACKAGES, "benchmarks", "docs", "tests"}
