"""The parser of the command line: a mistake is answered with what was meant, not with every option there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import import_module
from inspect import isabstract, signature
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from stochastic_layers.registry import nearest

__all__ = ["Parser"]

# where the short names of classes come from, and of what kind these are, by the option that takes them
CLASSES: dict[str, tuple[type, list[str]]] = {
    "data": (LightningDataModule, ["lightning_modules.data"]),
    "trainer.logger": (Logger, ["lightning.pytorch.loggers"]),
    "trainer.callbacks": (Callback, ["lightning.pytorch.callbacks", "lightning_modules.callbacks"]),
}


class Parser(LightningArgumentParser):
    """Lightning's parser, with a usage of one line and a guess at what was meant."""

    def print_usage(self, file: Any = None) -> None:
        command = self.prog.replace(" [options]", "")
        print(f"usage: {command} [OPTIONS], of which `{command} --help` tells", file=file or sys.stdout)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        super().error(message + "".join(f"\n{hint}" for hint in _hints(message, parser)), ex)


def _hints(message: str, parser: LightningArgumentParser) -> Iterable[str]:
    """What was meant, for the mistakes that are made most."""
    if found := re.search(r"[Uu]nrecognized arguments: (--[^\s=]+)", message):
        yield nearest(found[1], parser._option_string_actions)
    # in a configuration file: of one command, or of all
    if found := re.search(r"(?:Subcommand '\w+'|Group '(\w+)') does not accept option '([\w.]+)'", message):
        option = ".".join(part for part in found.groups() if part)
        yield nearest(option, [name.removeprefix("--") for name in parser._option_string_actions])
    key = re.search(r'Parser key "([\w.]+)"', message)
    if key and (found := re.search(r"Expected a dot import path string: (\w+)$", message, re.MULTILINE)):
        names = list(_short_names(key[1]))
        if names:
            yield nearest(found[1], names)
    if found := re.search(
        r"class_path '([\w.]+)\.(\w+)':\s+(?:Option|.*Key) '(\w+)' is not (?:accepted|expected)", message
    ):
        yield nearest(found[3], signature(getattr(import_module(found[1]), found[2])).parameters)


def _short_names(option: str) -> Iterable[str]:
    """The names by which an option takes classes."""
    kind, modules = CLASSES.get(option, (object, []))
    for module in map(import_module, modules):
        for name in module.__all__:
            found = getattr(module, name)
            if isinstance(found, type) and issubclass(found, kind) and not isabstract(found):
                yield name
