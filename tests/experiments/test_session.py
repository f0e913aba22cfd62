"""What all experiments share: options and files of options, their resolved config, tracking, checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import metaopt
from experiments import hyperopt
from experiments.parts.session import Tracked, as_yaml, options, session
from metaopt.tasks import NoisyQuadratic
from tests.tracking.stored import ROOT, Stored, environment


@dataclass(frozen=True)
class Config(Tracked):
    lr: float = 0.1
    steps: int = 3
    quick: bool = False
    names: tuple[str, ...] = ("a",)


# Options


def test_a_file_of_options_is_read_and_the_command_line_goes_before(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("lr: 0.5\nsteps: 7\nquick: true\nnames: [x, y]\nout: somewhere\n")
    expected = Config(lr=0.5, steps=7, quick=True, names=("x", "y"), out=Path("somewhere"))
    assert options(Config, None, ["--config", str(file)]) == expected
    assert options(Config, None, [f"--config={file}", "--lr", "2"]) == replace(expected, lr=2.0)
    assert options(Config, None, ["--lr", "2", f"--config={file}", "--quick=False"]) == replace(
        expected, lr=2.0, quick=False
    )


def test_the_resolved_config_is_a_file_of_options(tmp_path: Path) -> None:
    config = Config(lr=1e-5, quick=True, names=("x", "y"), out=tmp_path)
    file = tmp_path / "options.yaml"
    file.write_text(as_yaml(config))
    assert options(Config, None, ["--config", str(file)]) == config
    radam = hyperopt.Config(optimizer="radam", out=tmp_path)
    file.write_text(as_yaml(radam))
    assert options(hyperopt.Config, None, ["--config", str(file)]) == radam


@pytest.mark.parametrize("word", ["--quick", "--quick=True", "--quick=true"])
def test_booleans_as_a_sweep_writes_them(word: str) -> None:
    assert options(Config, None, [word]).quick is True


@pytest.mark.parametrize(
    ("word", "names"),
    [("--names=['x', 'y']", ("x", "y")), ("--names=[]", ()), ('--names=["x"]', ("x",)), ("--names=x", ("x",))],
)
def test_lists_as_a_sweep_writes_them(word: str, names: tuple[str, ...]) -> None:
    assert options(Config, None, [word, "--lr=2"]) == Config(names=names, lr=2.0)


def test_a_list_that_is_none_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^--names must be a list such as \['a', 'b'\], got \['x'$"):
        options(Config, None, ["--names=['x'"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stebs: 3", "unknown option 'stebs'; did you mean 'steps'?"),
        ("- a", "must hold options as a mapping, got list"),
        ("a: [", "while parsing"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as raised:
        options(Config, None, ["--config", str(file)])
    assert str(raised.value).startswith(f"--config {file}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_trial_of_a_sweep_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAOPT_CHECKPOINT", str(tmp_path / "trial" / "checkpoint"))
    assert options(Config, None, []).out == tmp_path / "trial" / "results"
    assert options(Config, None, ["--out", "mine"]).out == Path("mine")


# Sessions


def learn(config: Config, steps: int = 4) -> tuple[float, list[Any]]:
    opt = metaopt.functional.sgd(lr=0.1)
    hyper = metaopt.Hyperparameters(opt, ("lr",))
    meta_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.1)
    with session(config, "test") as run:
        metaopt.meta_train(
            NoisyQuadratic(),
            opt,
            hyper,
            metaopt.metagrad.Unrolled(5),
            meta_optimizer,
            steps,
            generator=torch.Generator().manual_seed(0),
            progress=False,
            **run.part(study="learned, scalars"),
        )
    lines = [json.loads(line) for line in (config.out / "record.jsonl").read_text().splitlines()]
    return hyper.numbers()["lr"], [line["step"] for line in lines if "meta_loss" in line]


def test_a_run_begins_anew_or_goes_on_as_it_is_told(tmp_path: Path) -> None:
    config = Config(out=tmp_path, wandb="off")
    whole, steps = learn(config, 6)
    assert steps == list(range(6))
    half, _ = learn(config, 3)
    assert half != whole
    resumed, steps = learn(replace(config, resume=True), 6)
    assert resumed == whole
    assert steps == list(range(6))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["resume"] is True


@pytest.mark.parametrize("variable", ["METAOPT_CHECKPOINT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_trial_and_a_restarted_process_go_on(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(out=tmp_path / "out", wandb="off")
    whole, _ = learn(config, 6)
    if variable == "METAOPT_CHECKPOINT":
        monkeypatch.setenv(variable, str(tmp_path / "checkpoint"))
        learn(config, 3)
    else:
        learn(config, 3)
        monkeypatch.setenv(variable, "1")
    assert learn(config, 6) == (whole, list(range(6)))


def test_a_trial_without_wandb_is_in_the_record_that_the_engine_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAOPT_CHECKPOINT", str(tmp_path / "trial" / "checkpoint"))
    monkeypatch.setenv("METAOPT_RECORD", str(tmp_path / "trial" / "record.jsonl"))
    _, steps = learn(Config(out=tmp_path / "out", wandb="off"))
    assert steps == list(range(4))
    assert (tmp_path / "trial" / "record.jsonl").read_text() == (tmp_path / "out" / "record.jsonl").read_text()


# The main job, as a user has it who has told wandb nothing: no key, no terminal, no network


def main_job(out: Path, home: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    home.mkdir(exist_ok=True)
    small = ["--optimizer=radam", "--task=quadratic", "--steps=6", "--meta_steps=4", "--replicas=2", "--seeds=3"]
    return subprocess.run(
        [sys.executable, "-m", "experiments.hyperopt", *small, f"--out={out}", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment(home, OMP_NUM_THREADS="1", **variables),
        check=True,
    )


@pytest.mark.xdist_group("wandb")
def test_the_main_job_is_in_wandb_and_in_the_record(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    out = tmp_path / "out"
    done = main_job(out, tmp_path / "home")
    assert "radam" in done.stdout
    (folder,) = out.glob("wandb/offline-run-*")
    stored = Stored(folder)
    rows: dict[str, Any] = {}
    for row in stored.rows:
        rows |= row
    scalars = "radam/learned, scalars"
    norms = ["grad_norm", "grad_norms/lr", "grad_norms/betas[0]", "grad_snr/lr"]
    figures = ["meta_loss", "train/loss", "validation/loss", "test/loss", "seconds", "memory_mib/process"]
    for name in [*norms, *figures, "hyper/lr", "hyper/betas[1]"]:
        assert isinstance(rows[f"{scalars}/{name}"], float), name
    assert "radam/evaluation/test_loss_mean" in rows
    assert rows["meta_step"] >= 3
    columns = stored.table(f"{scalars}/validation")["columns"]
    assert columns == ["inner_step", "validation/loss"]
    assert len(stored.table(f"{scalars}/train")["data"]) == 6
    schedule = stored.table("radam/learned, per step and parameter/schedule")
    assert schedule["columns"][0] == "inner_step"
    assert any(column.startswith("lr/") for column in schedule["columns"])
    config = stored.summary()["config"]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["meta_steps"] == 4
    assert {key: config[key] for key in resolved} == resolved
    (name,) = {a["name"] for a in stored.of("artifact") if a["type"] == "json" and "scalars" in a["name"]}
    (content,) = stored.artifact(name).values()
    assert set(content) >= {"lr", "betas", "eps"}
    assert not list((tmp_path / "home").rglob("*wandb*"))
    record = (out / "record.jsonl").read_text()
    assert record.count('"meta_loss"') >= 8


@pytest.mark.parametrize("way", ["disabled", "not installed"])
def test_without_wandb_the_record_remains(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "not installed":
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setitem(sys.modules, "wandb", None)
    learn(Config(out=tmp_path))
    assert not (tmp_path / "wandb").exists()
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert {line["study"] for line in lines} == {"learned, scalars"}
    assert [line["content"]["lr"] for line in lines if line.get("name") == "hyperparameters"]
