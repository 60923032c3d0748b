"""The configuration files that a command line names, looked at before the parser reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["given", "names_data", "read"]


def given(words: Sequence[str], *options: str) -> Iterator[tuple[str, str]]:
    """Those options that stand among the words of a command line, each with its value, in their order."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in options:
            yield option, value or following


def read(path: str | Path) -> Mapping[str, Any]:
    """What a configuration file holds; empty where the parser will find fault with it.

    Raises:
        ValueError: It is no YAML, or holds no options, of which the parser would not say where.
    """
    if not Path(path).is_file():
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: needed a text file of options, got other bytes ({error}); name another file."
        ) from None
    except yaml.YAMLError as error:  # the parser would not name the file
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ValueError(f"{path}{place}: needed YAML, got what is none ({problem}); correct it.") from None
    except OSError:
        return {}
    if not isinstance(content, Mapping):
        got = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ValueError(
            f"{path}: needed a mapping of options, such as `model: {{lr: 0.001}}`, got {got}; write some into it, or "
            "leave --config out."
        )
    return content


def names_data(words: Sequence[str]) -> bool:
    """Whether the command line, or a configuration file that it names, chooses the data module.

    Raises:
        ValueError: See :func:`read`.
    """
    contents = [read(path) for _, path in given(words, "--config", "-c")]
    # in a file that is named before the command, its options are below the name of that
    parts = [part for content in contents for part in (content, *map(content.get, words))]
    return any(given(words, "--data", "--data.class_path")) or any(
        isinstance(part, Mapping) and "data" in part for part in parts
    )
