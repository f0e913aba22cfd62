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
    options = {name: value for name, value in options.items() if not _decided(name)}
    options |= {"config": config, "dir": str(root.absolute())}
    try:
        settings = wandb.setup().settings
        key = _key(settings)
        resolved = mode or _mode_of_settings(settings, key)
        if resolved == "disabled":
            return None, resolved
        if resolved == "offline":
            return _init(wandb, _offline(), options), resolved
        if key is None:
            raise ValueError("there is no API key: run `wandb login`, set WANDB_API_KEY or choose mode='offline'")
        try:
            return _init(wandb, _online(key, asked=mode is not None), options), resolved
        except wandb.errors.CommError as error:
            # a key lies on many machines from which nothing can be reached; one that is refused is an error
            if mode is not None or isinstance(error, wandb.errors.AuthenticationError):
                raise
            warnings.warn(
                f"wandb's server does not answer, the run goes offline: {error}", RuntimeWarning, stacklevel=3
            )
            return _init(wandb, _offline(), options), "offline"
    except Exception as error:
        message = f"wandb could not start a run in {root}: {error} (WANDB_MODE=disabled does without wandb)"
        raise RuntimeError(message) from error


def _init(wandb: Any, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    if _FLUSH in wandb.Settings.model_fields:
        settings = {**settings, _FLUSH: 0.2}  # seconds; wandb's own 15 would be lost when the process is killed
    else:
        warnings.warn(
            f"wandb {wandb.__version__} has no setting {_FLUSH}: if the process is killed, its file lacks some seconds",
            RuntimeWarning,
            stacklevel=4,
        )
    # a run of its own, also beside others in this process
    return wandb.init(settings=wandb.Settings(**settings), reinit="create_new", **options)


def _offline() -> dict[str, Any]:
    """Without a word: a run that goes nowhere has no news, and there may be many."""
    return {"mode": "offline"} if "WANDB_SILENT" in os.environ else {"mode": "offline", "silent": True}


def _online(key: str, asked: bool) -> dict[str, Any]:
    """With the key that was found, so that nothing is left to ask for."""
    settings: dict[str, Any] = {"mode": "online"}
    if key:
        settings["api_key"] = key
    if not asked and "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["init_timeout"] = 20.0  # seconds, in place of 90
    return settings


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
    """Make the folder for wandb's files, and settle in the environment what the user has not."""
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # wandb itself would go to the system's folder of temporary files, where nobody looks for it
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write to {folder}")
    except OSError as error:
        raise RuntimeError(f"wandb could not start a run in {folder.parent}: {error}") from error
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))
    # its reports about itself go to its server in offline mode too; without a network they cost seconds at the end
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


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
            entry = entries.hosts.get(host)  # an entry for any host at all is no key of wandb's
            if entry is not None and entry[2]:
                return entry[2]
    return settings.api_key or None


def _decided(option: str) -> bool:
    """Whether the environment decides: the agent of a sweep, or the user."""
    if option == "project" and os.environ.get("WANDB_SWEEP_ID"):
        return True
    return bool(os.environ.get(_VARIABLES.get(option, "")))
