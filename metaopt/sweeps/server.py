"""The other engine: wandb's server draws the points, and its agents run them here."""

from __future__ import annotations

import subprocess
import sys

from metaopt.sweeps.definition import Sweep, SweepError


def run(sweep: Sweep, workers: int) -> int:
    """Register a sweep with wandb's server, and run agents until it has nothing left.

    Args:
        sweep: as read from a file, which the server gets as it is.
        workers: agents, which run one trial at a time each.

    Returns:
        The exit code: the largest of the agents'.

    Raises:
        SweepError: no key, or the server refuses.
        ImportError: wandb is missing.
    """
    try:
        import wandb
        import yaml
    except ImportError:
        raise ImportError('--engine wandb needs wandb: pip install "metaopt[wandb,sweeps]"') from None
    if workers < 1:
        raise SweepError(f"workers must be >= 1, got {workers}")
    try:
        known = wandb.login(prompt=False)
    except (wandb.Error, ValueError) as error:
        raise SweepError(f"wandb: {_line(error)}") from None
    if not known:
        raise SweepError("--engine wandb needs an account at wandb's server: run wandb login, or set WANDB_API_KEY")
    try:
        identity = wandb.sweep(yaml.safe_load(sweep.text), entity=sweep.entity, project=sweep.project)
    except (wandb.Error, OSError, ValueError) as error:
        raise SweepError(f"wandb's server did not take the sweep: {_line(error)}") from None
    command = [sys.executable, "-m", "wandb", "agent"]
    for option, value in (("--entity", sweep.entity), ("--project", sweep.project)):
        command += [option, value] if value is not None else []
    agents = [subprocess.Popen([*command, identity]) for _ in range(workers)]
    try:
        return max(agent.wait() for agent in agents)
    except KeyboardInterrupt:  # the terminal has sent it to the agents too, which stop their trials
        for agent in agents:
            agent.wait()
        return 130


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
