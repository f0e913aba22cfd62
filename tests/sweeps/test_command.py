"""wandb's command macros. The expected words are what wandb's own agent makes of the same values."""

import json
import sys
from pathlib import Path

import pytest

from metaopt.sweeps import SweepError, parse
from metaopt.sweeps.command import expand, nested

PARAMETERS = """
method: random
parameters:
  lr: {min: 0.1, max: 0.2}
  flag: {values: [true, false]}
  hidden: {values: [true, false]}
  none: {value: null}
  sizes: {value: [1, x]}
  optimizer:
    parameters:
      name: {value: a b}
      inner: {parameters: {lr: {min: 0.0, max: 1.0}}}
  data.path: {value: here}
"""
CONFIG = {
    "data.path": "here",
    "flag": True,
    "hidden": False,
    "lr": 0.1,
    "none": None,
    "optimizer.inner.lr": 1e-05,
    "optimizer.name": "a b",
    "sizes": [1, "x"],
}
VALUES = {
    "data.path": "here",
    "flag": True,
    "hidden": False,
    "lr": 0.1,
    "none": None,
    "optimizer": {"inner": {"lr": 1e-05}, "name": "a b"},
    "sizes": [1, "x"],
}


def words(command: str) -> list[str]:
    return expand(parse(f"program: train.py\ncommand: {command}\n{PARAMETERS}"), CONFIG, "/opt/python")


def agents_words(macro: str) -> list[str]:
    """What wandb's agent passes."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    made = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in VALUES.items()}})
    return list(made[macro])


@pytest.mark.parametrize(
    "macro",
    [
        "args",
        "args_no_equals",
        "args_no_hyphens",
        "args_no_boolean_flags",
        "args_append_hydra",
        "args_override_hydra",
        "args_json",
    ],
)
def test_arguments_are_those_of_wandbs_agent(macro: str) -> None:
    assert words(f'["${{{macro}}}"]') == agents_words(macro)


def test_the_default_command_is_wandbs(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = parse("{program: train.py, method: grid, parameters: {lr: {value: 0.1}, a: {value: false}}}")
    assert expand(sweep, {"a": False, "lr": 0.1}, "/opt/python") == [
        *("/usr/bin/env", "/opt/python", "train.py", "--a=False", "--lr=0.1")
    ]
    monkeypatch.setattr(sys, "platform", "win32")
    assert expand(sweep, {"a": False, "lr": 0.1}, "python")[0] == "python"


def test_boolean_flags_are_given_or_left_out() -> None:
    assert words('["${args_no_boolean_flags}"]')[:3] == ["--data.path=here", "--flag", "--lr=0.1"]


def test_a_nested_parameter_is_one_argument_and_a_dot_in_a_name_is_a_dot() -> None:
    assert "--optimizer={'inner': {'lr': 1e-05}, 'name': 'a b'}" in words('["${args}"]')
    assert "--data.path=here" in words('["${args}"]')


def test_other_words_stay_as_they_are() -> None:
    assert words('[torchrun, --nproc-per-node, 2, "${program}", "x=${args}", true]') == [
        *("torchrun", "--nproc-per-node", "2", "train.py", "x=${args}", "True")
    ]


def test_environment_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("SPLIT", "train")
    assert words('["--path=${envvar:DATA}/${envvar:SPLIT}", "${envvar:DATA}"]') == ["--path=/data/train", "/data"]
    monkeypatch.delenv("DATA")
    with pytest.raises(SweepError, match=r"\$\{envvar:DATA\}: the environment variable DATA is not set"):
        words('["${envvar:DATA}"]')


def test_values_go_into_a_file_as_json(tmp_path: Path) -> None:
    sweep = parse(f'command: [run, "${{args_json_file}}"]\n{PARAMETERS}')
    path = tmp_path / "values.json"
    assert expand(sweep, CONFIG, "python", path) == ["run", str(path)]
    assert json.loads(path.read_text()) == VALUES
    _, made = expand(sweep, CONFIG, "python")
    assert json.loads(Path(made).read_text()) == VALUES
    Path(made).unlink()


def test_nested_values_are_those_of_wandb_config() -> None:
    sweep = parse(f"program: train.py\n{PARAMETERS}")
    assert nested(CONFIG, sweep) == VALUES
    assert nested({"a.b.c": 1, "a.b.d": 2, "e": 3}) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


def test_a_name_with_a_dot_stands_beside_what_is_before_the_dot() -> None:
    # So do sweeps of programs that are configured by Hydra.
    sweep = parse("{program: a, method: grid, parameters: {optimizer: {value: sgd}, optimizer.lr: {value: 0.1}}}")
    (point,) = sweep.grid()
    assert nested(point, sweep) == {"optimizer": "sgd", "optimizer.lr": 0.1}
    assert expand(sweep, point, "python")[-2:] == ["--optimizer=sgd", "--optimizer.lr=0.1"]
    with pytest.raises(ValueError, match=r"optimizer and optimizer\.lr cannot both be nested: pass the sweep"):
        nested(point)
