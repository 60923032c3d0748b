"""The parser of the command line: a mistake is answered with what was meant, not with every option there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import import_module
from inspect import signature
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from stochastic_layers.registry import nearest

__all__ = ["Parser"]

# where the short names of classes come from, by the option that takes them
MODULES = {
    "data": ["lightning_modules.data"],
    "trainer.logger": ["lightning.pytorch.loggers"],
    "trainer.callbacks": ["lightning.pytorch.callbacks", "lightning_modules.callbacks"],
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
    key = re.search(r'Parser key "([\w.]+)"', message)
    if key and (found := re.search(r"Expected a dot import path string: (\w+)$", message, re.MULTILINE)):
        names = [name for module in MODULES.get(key[1], []) for name in import_module(module).__all__]
        if names:
            yield nearest(found[1], names)
    if found := re.search(
        r"class_path '([\w.]+)\.(\w+)':\s+(?:Option|.*Key) '(\w+)' is not (?:accepted|expected)", message
    ):
        yield nearest(found[3], signature(getattr(import_module(found[1]), found[2])).parameters)
