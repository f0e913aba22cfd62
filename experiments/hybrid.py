"""The program of a trial in a hybrid search: a sweep draws what has no derivative, hypergradients find the rest.

    python -m experiments.hybrid --width=64 --lr=0.03 --beta1=0.9                   # trains with these
    python -m experiments.hybrid --width=64 --lr=0.03 --learn lr betas              # learns two of them from there
    metaopt sweep run experiments/sweeps/hybrid.yaml --workers 2                    # many such trials

What is named by ``learn`` (the optimizer's own names: ``betas`` is beta1 and beta2) starts at its option or default and
is found by gradient descent through training, as a scalar, a value per step, per parameter, or both. In a sweep file a
list is ``learn: {value: [lr, betas]}``, which arrives as ``--learn=['lr', 'betas']``.

Whatever was learned, and from which seeds, a trial is judged as one in which nothing is: it trains ``seeds`` networks
that were not learned on, and logs the mean ``validation/loss``, the ``test/loss`` and ``inner_steps``: how many steps
of training the trial has taken in all, those of every replica of every meta-step counted, and those of the judging.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import nn

import metaopt
from experiments.parts.evaluation import FRESH, read
from experiments.parts.meta_optimizer import annealed_adam
from experiments.parts.running import meta_losses, run
from experiments.parts.session import Session, Tracked, options, session
from experiments.parts.space import cosine
from metaopt import PerParameter, Schedule
from metaopt.functional import REGISTRY, Optimizer
from metaopt.functional.tree import Tree
from metaopt.tasks import MNIST1D, Digits, Replicas
from metaopt.tasks.classification import Classification
from metaopt.tracking import Run
from metaopt.train import NonFiniteError

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
INPUTS = {"mnist1d": 40, "digits": 64}
# An option holds one number, and so does a parameter of a sweep.
PAIRS = {"betas": ("beta1", "beta2"), "etas": ("eta_minus", "eta_plus"), "step_sizes": ("step_min", "step_max")}


@dataclass(frozen=True)
class Config(Tracked):
    """Train with given hyperparameters, or learn some of them from there."""

    task: Literal["digits", "mnist1d"] = "digits"
    steps: int = 60
    """Inner training steps: the horizon."""
    batch_size: int = 100
    width: int = 50
    """Units of a hidden layer."""
    depth: int = 1
    """Hidden layers."""
    activation: Literal["tanh", "relu", "silu"] = "tanh"

    optimizer: Literal["radam", "rprop", "adam", "adamw", "sgd"] = "radam"
    lr: float | None = None
    """This and the following: None for the optimizer's default."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How lr goes to 0 over the steps; with lr per step, where learning starts."""
    momentum: float | None = None
    weight_decay: float | None = None
    eps: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eta_minus: float | None = None
    eta_plus: float | None = None
    step_min: float | None = None
    step_max: float | None = None

    learn: tuple[str, ...] = ()
    """Hyperparameters found by hypergradient: the optimizer's names, such as lr, betas, weight_decay, eps."""
    per_step: tuple[str, ...] = ()
    """Those of them that get a value for each step."""
    per_parameter: tuple[str, ...] = ()
    """Those of them that get a value for each weight matrix and bias."""
    meta_steps: int = 10
    meta_lr: float = 0.4
    """Adam's learning rate in unconstrained coordinates (log lr, logit beta), annealed to 0."""
    clip: float = 1.0
    """Largest norm of a meta-gradient."""
    replicas: int = 1
    """Runs per meta-step."""
    seed: int = 0
    """Of the runs that are learned on."""
    seeds: int = 3
    """Fresh seeds that a trial is judged by, the same for all trials."""
    out: Path = Path("runs/hybrid")
    """Folder for config.yaml, record.jsonl, checkpoints and wandb's files."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "depth", "meta_steps", "replicas", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        for name in ("meta_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {name}={getattr(self, name)}")
        known = self.functional().hyperparameters
        for name in self.learn:
            if name not in known:
                raise ValueError(f"learn must be among {', '.join(known)} of {self.optimizer}, got {name!r}")
        for form in ("per_step", "per_parameter"):
            for name in getattr(self, form):
                if name not in self.learn:
                    raise ValueError(f"{form} must be among learn={self.learn}, got {name!r}")
        if self.decay != "constant" and self.optimizer == "rprop":
            raise ValueError(f"decay is of a learning rate per step, which rprop has not, got decay={self.decay!r}")
        if self.decay != "constant" and "lr" in self.learn and "lr" not in self.per_step:
            raise ValueError(f"decay={self.decay!r} with a learned lr needs it in per_step")

    def functional(self) -> Optimizer:
        """The optimizer with the options that are given.

        Raises:
            ValueError: one that it does not have, or outside its domain.
        """
        make = cast("Callable[..., Optimizer]", REGISTRY[self.optimizer])
        defaults = make().defaults
        parts = {name: PAIRS.get(name, (name,)) for name in defaults}
        mine = {key for keys in parts.values() for key in keys}
        for key in ("lr", "momentum", "weight_decay", "eps", *(key for pair in PAIRS.values() for key in pair)):
            if getattr(self, key) is not None and key not in mine:
                raise ValueError(f"{self.optimizer} has no {key}, got {key}={getattr(self, key)}")
        values: dict[str, Any] = {}
        for name, keys in parts.items():
            default = defaults[name] if name in PAIRS else (defaults[name],)
            found = tuple(_or(getattr(self, key, None), part) for key, part in zip(keys, default, strict=True))
            values[name] = found if name in PAIRS else found[0]
        return make(**values)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass
class Learned:
    """What is known after learning: values as plain numbers (None if nothing was found), and what they have cost."""

    values: dict[str, Any] | None
    inner_steps: int = 0
    seconds: float = 0.0


class _Counting:
    """Logs meta-steps and what they have cost, without the looks that a `metaopt.tracking.Run` is given between them:
    these are training runs too."""

    def __init__(self, run: Run, learned: Learned, per_step: int) -> None:
        self._run, self._learned, self._per_step = run, learned, per_step
        self._begun = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if not self._begun:
            self._run.rewind(step)  # of a trial that goes on
            self._begun = True
        self._learned.inner_steps = (step + 1) * self._per_step
        self._learned.seconds += metrics["seconds"]
        self._run.log({**metrics, "inner_steps": self._learned.inner_steps}, step)


def network(config: Config) -> nn.Module:
    """Linear layers with an activation between."""
    sizes = [INPUTS[config.task], *[config.width] * config.depth]
    layers = [
        layer
        for fan_in, fan_out in pairwise(sizes)
        for layer in (nn.Linear(fan_in, fan_out), ACTIVATIONS[config.activation]())
    ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(config.width, 10))


def make_task(config: Config) -> Classification:
    kind = MNIST1D if config.task == "mnist1d" else Digits
    return kind(partial(network, config), batch_size=config.batch_size)


def decayed(config: Config, lr: float) -> list[float]:
    """The learning rate at each step."""
    if config.decay == "linear":
        return [lr * (1 - step / config.steps) for step in range(config.steps)]
    falling = cosine(lr, config.steps)
    return [lr if config.decay == "constant" else falling(step) for step in range(config.steps)]


def start(config: Config, names: list[str], name: str, value: Any) -> Any:
    """Where the learning of a hyperparameter starts, in the form that it is to have."""
    if name in PAIRS and isinstance(value, tuple):
        return tuple(start(config, names, name, part) for part in value)
    if name in config.per_step:
        value = Schedule(config.steps, decayed(config, value) if name == "lr" else value)
    return PerParameter(names, value) if name in config.per_parameter else value


def learn(config: Config, task: Classification, opt: Optimizer, run: Session) -> Learned:
    """Meta-train; a run whose training cannot be differentiated any more has found nothing."""
    names = Tree(task.init(torch.Generator().manual_seed(0))).names
    hyper = metaopt.Hyperparameters(
        opt, learn={name: start(config, names, name, opt.defaults[name]) for name in config.learn}
    )
    meta_optimizer, annealing = annealed_adam(hyper, config.meta_lr, config.meta_steps, config.clip, betas=(0.9, 0.99))
    learned = Learned(None)
    part = run.part()
    part["tracker"] = _Counting(run.tracker, learned, config.replicas * config.steps)  # type: ignore[typeddict-item]
    try:
        result = metaopt.meta_train(
            Replicas(task, config.replicas),
            opt,
            hyper,
            metaopt.metagrad.Unrolled(config.steps),
            meta_optimizer,
            steps=config.meta_steps,
            generator=torch.Generator().manual_seed(config.seed),
            scheduler=annealing,
            on_nonfinite="skip",
            progress=False,
            **part,
        )
    except NonFiniteError:
        return dataclasses.replace(learned, values=None)
    # Also those before a crash
    learned.inner_steps = len(result.history) * config.replicas * config.steps
    learned.seconds = sum(record["seconds"] for record in result.history)
    learned.values = hyper.numbers()
    return learned


def judge(config: Config, task: Classification, opt: Optimizer, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Train on fresh seeds, the same for all trials; the figures of a trial."""
    if values is None:
        nothing = float("nan")
        return {"validation/loss": nothing, "test/loss": nothing, "test/accuracy": nothing}
    generator = torch.Generator().manual_seed(FRESH)
    params = run(task, opt, read(values, config.optimizer), config.steps, config.seeds, generator)
    test = torch.vmap(task.test)(params)
    return {
        "validation/loss": float(meta_losses(task, params).mean()),
        **{f"test/{name}": float(figure.mean()) for name, figure in test.items()},
    }


def main(config: Config) -> dict[str, Any]:
    """Learn what is to be learned, train with it and judge; what is logged at the end."""
    torch.set_num_threads(1)
    task, opt = make_task(config), config.functional()
    with session(config, "hybrid") as trial:
        decays = config.decay != "constant"
        learned = Learned({"lr": decayed(config, opt.defaults["lr"])} if decays else {})
        if config.learn:
            learned = learn(config, task, opt, trial)
        started = perf_counter()
        figures = judge(config, task, opt, learned.values)
        figures["inner_steps"] = learned.inner_steps + config.seeds * config.steps * (learned.values is not None)
        figures["seconds"] = learned.seconds + perf_counter() - started
        last = config.meta_steps if config.learn else 0
        trial.tracker.rewind(last)
        trial.tracker.log(figures, last)
        trial.tracker.artifact("hyperparameters", {**opt.defaults, **(learned.values or {})})
    print(f"validation loss {figures['validation/loss']:.4f} after {figures['inner_steps']} inner steps")
    return figures


if __name__ == "__main__":
    main(options(Config, __doc__))
