"""The run directory: whose it is, whether it may be entered, and what is written about the run once.

Never wiped. A directory that holds something else is refused; one that holds a run is continued when the settings that
change the mathematics are the same, and refused, by key, when they are not.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilient_t5.config.schema import REMOVED_KEYS, Config, trajectory_settings
from resilient_t5.errors import ResumeMismatch, RunDirectoryError
from resilient_t5.files import write_whole

FORMAT = 1
ENVIRONMENT = "environment.json"
OWN_BEFORE_A_RUN = {"store", "run.lock", "STOP", "train.log"}
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "sentencepiece", "safetensors", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that this process may use, and the id of its run; `is_new` as long as it holds none."""

    path: Path
    run_id: str
    is_new: bool


def inspect(config: Config) -> RunDirectory:
    """Whether the run directory of `config` may be used; writes nothing. Call it under the run lock.

    Raises:
        RunDirectoryError: the directory holds files that are no run, or a run although a new one is wanted.
        ResumeMismatch: the run it holds was started with another mathematics; all keys are named.
    """
    path = Path(config.run.dir)
    if not (path / ENVIRONMENT).exists():
        refuse_foreign_files(path)
        return RunDirectory(path, uuid.uuid4().hex, is_new=True)
    stored = _read(path / ENVIRONMENT)
    if config.run.resume == "none":
        raise RunDirectoryError(
            f"{path} holds a run, and this one is to be a new one",
            hint=f"Continue it with bin/train --config {path / 'config.yaml'}, or choose another --run.dir",
        )
    _refuse_other_mathematics(path, stored["mathematics"], config)
    return RunDirectory(path, stored["run_id"], is_new=False)


def claim(directory: RunDirectory, config: Config, config_yaml: str, device: str) -> None:
    """Write what is written once about a run; what is there stays.

    Args:
        directory: what `inspect` found.
        config: the configuration.
        config_yaml: its text as config.yaml holds it.
        device: the device in words, for environment.json.
    """
    if directory.is_new:
        description = {"run_id": directory.run_id, "format": FORMAT, "device": device, **describe_environment()}
        text = json.dumps({**description, "mathematics": trajectory_settings(config)}, indent=2, ensure_ascii=False) + "\n"
        write_whole(directory.path / ENVIRONMENT, text)
    if not (directory.path / "config.yaml").exists():
        write_whole(directory.path / "config.yaml", config_yaml)


def refuse_foreign_files(path: Path) -> None:
    """Raise RunDirectoryError when `path` is no directory, or holds files that no run of ours left."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file, not a directory", hint="Choose another --run.dir")
    if not path.exists() or (path / ENVIRONMENT).exists():
        return
    foreign = sorted(
        item.name for item in path.iterdir() if item.name not in OWN_BEFORE_A_RUN and not item.name.startswith(".")
    )
    if foreign:
        raise RunDirectoryError(
            f"{path} is not empty and holds no run", where=", ".join(foreign[:5]), hint="Choose another --run.dir"
        )


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every setting that differs."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def changed_trajectory_settings(old: dict[str, Any], config: Config) -> list[str]:
    """`key: old -> new` for every setting of `config` that would change the mathematics of a run saved with `old`.

    A key that a later version brought is missing in `old`, which ran as that version does by default; one that a later
    version dropped is not looked at.
    """
    new = trajectory_settings(config)
    known = {**trajectory_settings(Config()), **old}
    return changed_keys({key: value for key, value in known.items() if key in new}, new)


def removed_settings(old: dict[str, Any]) -> list[str]:
    """`key: old -> removed` for every setting of a run saved with `old` that had an effect and no longer exists."""
    effective = [key for key, removed in REMOVED_KEYS.items() if key in old and old[key] not in removed.inert]
    return [f"{key}: {old[key]} -> removed" for key in effective]


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command line."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": os.cpu_count(),
        "versions": versions,
    }


def _refuse_other_mathematics(path: Path, old: dict[str, Any], config: Config) -> None:
    if changed := changed_trajectory_settings(old, config):
        raise ResumeMismatch(
            f"{path} holds another run; going on with these settings would change its mathematics",
            where="; ".join(changed),
            hint=f"Continue it with its own settings: bin/train --config {path / 'config.yaml'}; or choose another --run.dir",
        )


def _read(environment: Path) -> dict[str, Any]:
    try:
        stored = json.loads(environment.read_text(encoding="utf-8"))
        return {"run_id": str(stored["run_id"]), "mathematics": dict(stored["mathematics"])}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"{environment} is damaged ({error})", hint="Restore the file, or choose another --run.dir"
        ) from None
