"""Starting wandb so that it never asks, waits for no network that is not meant, and leaves the home folder alone."""

from __future__ import annotations

import netrc
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]
_MODES: Mapping[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_VARIABLES = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
}
_FLUSH = "x_transaction_log_flush_interval"


def begin(mode: Mode | None, root: Path, options: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Any, Mode]:
    """A new run of wandb's and its mode; no run where wandb's settings disable it.

    Args:
        mode: as asked for; None to follow wandb's settings and whether there is a key.
        root: the run's files go to ``root/wandb``.
        options: of ``wandb.init``; those that the environment decides are left out.
        config: plain values.

    Raises:
        ImportError: wandb is not installed.
        RuntimeError: the run could not be started.
    """
    wandb = imported()
    _prepare(root / "wandb")
    try:
        settings = wandb.setup().settings
        key = _key(settings)
        resolved = mode or _mode_of_settings(settings, key)
        if resolved == "disabled":
            return None, resolved
        if resolved == "online" and key is None:
            raise ValueError("there is no API key: run `wandb login`, set WANDB_API_KEY or choose mode='offline'")
        run = wandb.init(
            config=config,
            dir=str(root.absolute()),
            mode=resolved,
            reinit="create_new",  # a run of its own, also beside others in this process
            settings=_settings(wandb, resolved, key),
            **{name: value for name, value in options.items() if not _decided(name)},
        )
    except Exception as error:
        raise RuntimeError(
            f"wandb could not start a run in {root}: {error} (WANDB_MODE=disabled does without wandb)"
        ) from error
    return run, resolved


def imported() -> Any:
    """The module wandb.

    Raises:
        ImportError: it is not installed.
    """
    wandb: Any = None
    try:
        import wandb
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
    # The folder that wandb writes to, ./wandb, is an empty package to Python where the real one is missing.
    if getattr(wandb, "init", None) is None:
        raise ImportError('wandb is not installed: pip install "metaopt[wandb]"', name="wandb")
    return wandb


def asked_mode(mode: str | None) -> Mode | None:
    """The mode that the argument or WANDB_MODE asks for; None if neither does."""
    asked = mode if mode is not None else os.environ.get("WANDB_MODE") or None
    if asked is not None and asked not in _MODES:
        source = "mode" if mode is not None else "WANDB_MODE"
        raise ValueError(f"{source} must be 'online', 'offline' or 'disabled', got {source}={asked!r}")
    return None if asked is None else _MODES[asked]


def _prepare(folder: Path) -> None:
    """Make the folder for wandb's files, and have all that it stages and caches kept in there."""
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # wandb itself would go to the system's folder of temporary files, where nobody looks for it
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write to {folder}")
    except OSError as error:
        raise RuntimeError(f"wandb could not start a run in {folder.parent}: {error}") from error
    for variable, name in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
        os.environ.setdefault(variable, str(folder / name))


def _mode_of_settings(settings: Any, key: str | None) -> Mode:
    """What `wandb offline` or `wandb disabled` have set; else whether there is a key."""
    mode = _MODES.get(settings.mode, "online")
    return "offline" if mode == "online" and key is None else mode


def _key(settings: Any) -> str | None:
    """The key that wandb would find without asking, or "" if it has other credentials."""
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings).model_fields["base_url"].default:
        hosts.append("api.wandb.ai")  # where older versions kept the key for the same server
    for file in files:
        try:
            entries = netrc.netrc(os.path.expanduser(file))
        except (OSError, netrc.NetrcParseError):
            continue
        for host in hosts:
            entry = entries.authenticators(host)
            if entry is not None and entry[2]:
                return entry[2]
    return settings.api_key or None


def _decided(option: str) -> bool:
    """Whether the environment decides: the agent of a sweep, or the user."""
    if option == "project" and os.environ.get("WANDB_SWEEP_ID"):
        return True
    return bool(os.environ.get(_VARIABLES.get(option, "")))


def _settings(wandb: Any, mode: Mode, key: str | None) -> Any:
    chosen: dict[str, Any] = {}
    if _FLUSH in wandb.Settings.model_fields:
        chosen[_FLUSH] = 0.2  # seconds; wandb's own 15 would be lost when the process is killed
    else:
        warnings.warn(
            f"wandb {wandb.__version__} has no setting {_FLUSH}: if the process is killed, its file lacks some seconds",
            RuntimeWarning,
            stacklevel=4,
        )
    if mode == "offline":
        chosen["show_info"] = False  # how to sync is no news in each of many runs
    elif key:
        chosen["api_key"] = key  # what was found is used: nothing is left to ask for
    return wandb.Settings(**chosen)
