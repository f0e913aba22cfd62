"""The command line of a run: wandb's macros, filled in as wandb's agent fills them in.

A macro is a whole word of the command (``${envvar:NAME}`` may stand inside one). A nested parameter is one argument,
the text of a Python dict: ``--optimizer={'lr': 0.1}``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaopt.sweeps.definition import Sweep, SweepError

_DEFAULT = ("${env}", "${interpreter}", "${program}", "${args}")


def expand(sweep: Sweep, config: Mapping[str, Any], interpreter: str, json_file: Path | str | None = None) -> list[str]:
    """The words of the command that runs the program with these values.

    Args:
        sweep: its ``command``, or wandb's default ``/usr/bin/env INTERPRETER PROGRAM --lr=0.1 ...``.
        config: values by flat name, as ``sweep.suggest`` gives them.
        interpreter: for ``${interpreter}``, usually ``sys.executable``.
        json_file: where to write the values if the command has ``${args_json_file}``. None: a new temporary file.

    Raises:
        SweepError: ``${envvar:NAME}`` of a variable that is not set.

    Example:
        >>> from metaopt.sweeps import parse
        >>> sweep = parse('''
        ... {program: train.py, method: random, command: ["${interpreter}", "${program}", "${args}"],
        ...  parameters: {lr: {min: 0.1, max: 0.2}, model: {parameters: {width: {value: 8}}}}}''')
        >>> expand(sweep, {"lr": 0.15, "model.width": 8}, "python")
        ['python', 'train.py', '--lr=0.15', "--model={'width': 8}"]
    """
    values = nested(config, sweep)
    words: list[str] = []
    for word in sweep.command or _DEFAULT:
        if word == "${args_json_file}":
            words.append(_written(values, json_file))
        elif word == "${env}":
            words += ["/usr/bin/env"] if sys.platform != "win32" else []
        elif word == "${interpreter}":
            words.append(interpreter)
        elif word == "${program}":
            words.append(str(sweep.program))
        elif word.startswith("${args"):
            words += _arguments(word, values)
        else:
            words.append(re.sub(r"\$\{envvar:(\w+)\}", _variable, word))
    return words


def nested(config: Mapping[str, Any], sweep: Sweep | None = None) -> dict[str, Any]:
    """The values as ``wandb.config`` shows them.

    Args:
        config: values by flat name.
        sweep: tells a nested parameter from one with a dot in its name. None: every dot is nesting.

    Raises:
        ValueError: without a sweep, ``a`` beside ``a.b``.

    Example:
        >>> nested({"epochs": 3, "optimizer.lr": 0.1, "optimizer.name": "adam"})
        {'epochs': 3, 'optimizer': {'lr': 0.1, 'name': 'adam'}}
    """
    tree: dict[str, Any] = {}
    for name, value in config.items():
        *above, last = name.split(".") if sweep is None else sweep.paths[name]
        branch = tree
        for depth, key in enumerate(above, 1):
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                outer = ".".join(above[:depth])
                raise ValueError(f"{outer} and {name} cannot both be nested: pass the sweep, which knows what they are")
        branch[last] = value
    return tree


def _arguments(macro: str, values: Mapping[str, Any]) -> list[str]:
    """The words that one of the macros ``${args...}`` stands for."""
    pairs = [(name, f"{name}={value}") for name, value in values.items()]
    match macro:
        case "${args}":
            return [f"--{pair}" for _, pair in pairs]
        case "${args_no_hyphens}":
            return [pair for _, pair in pairs]
        case "${args_no_equals}":
            return [word for name, value in values.items() for word in (f"--{name}", str(value))]
        case "${args_append_hydra}":
            return [f"+{pair}" for _, pair in pairs]
        case "${args_override_hydra}":
            return [f"++{pair}" for _, pair in pairs]
        case "${args_no_boolean_flags}":
            flags = ((name, pair) for name, pair in pairs if values[name] is not False)
            return [f"--{name}" if values[name] is True else f"--{pair}" for name, pair in flags]
        case "${args_json}":
            return [json.dumps(values)]
        case _:
            raise AssertionError(macro)  # the reader of sweep files saw to it


def _written(values: Mapping[str, Any], path: Path | str | None) -> str:
    """Write the values as JSON; where."""
    if path is None:
        handle, path = tempfile.mkstemp(prefix="metaopt-", suffix=".json")
        os.close(handle)
    Path(path).write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def _variable(macro: re.Match[str]) -> str:
    try:
        return os.environ[macro[1]]
    except KeyError:
        raise SweepError(f"command: {macro[0]}: the environment variable {macro[1]} is not set") from None
