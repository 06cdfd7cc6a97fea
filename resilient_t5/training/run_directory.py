"""The run directory: check whether a run may use it, and write the files that describe the run once.

Nothing in it is ever deleted here. A directory with other content is refused. A directory with a run is continued if
`resume_check` accepts the settings.
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

from resilient_t5.config.schema import Config, trajectory_settings
from resilient_t5.errors import RunDirectoryError
from resilient_t5.files import write_whole
from resilient_t5.training.resume_check import refuse_changed_settings

FORMAT = 1
ENVIRONMENT = "environment.json"
OWN_BEFORE_A_RUN = {"store", "run.lock", "STOP", "train.log"}
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "sentencepiece", "safetensors", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that this process may use; `is_new` if it holds no run yet."""

    path: Path
    run_id: str
    is_new: bool


def inspect(config: Config) -> RunDirectory:
    """Check whether this run may use its directory; writes nothing. Call it while holding the run lock.

    Raises:
        RunDirectoryError: the directory has other content, or holds a run although run.resume is none.
        ResumeMismatch: the run in it has other mathematics; lists all keys.
    """
    path = Path(config.run.dir)
    if not (path / ENVIRONMENT).exists():
        refuse_foreign_files(path)
        return RunDirectory(path, uuid.uuid4().hex, is_new=True)
    run_id, mathematics = _read(path / ENVIRONMENT)
    command = f"bin/train --config {path / 'config.yaml'}"
    if config.run.resume == "none":
        raise RunDirectoryError(
            f"{path} already holds a run, and run.resume is none",
            hint=f"Continue it with {command}, or choose another --run.dir",
        )
    refuse_changed_settings(
        mathematics,
        config,
        f"{path} holds another run; these settings would change its mathematics",
        hint=f"Continue it with its own settings: {command}; or choose another --run.dir",
    )
    return RunDirectory(path, run_id, is_new=False)


def claim(directory: RunDirectory, config: Config, config_yaml: str, device: str) -> None:
    """Write environment.json and config.yaml if they are missing.

    Args:
        directory: the result of `inspect`.
        config: the configuration.
        config_yaml: its text, for config.yaml.
        device: description of the device, for environment.json.
    """
    if directory.is_new:
        description = {
            "run_id": directory.run_id,
            "format": FORMAT,
            "device": device,
            "command": shlex.join(sys.argv),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu_threads": os.cpu_count(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "mathematics": trajectory_settings(config),
        }
        write_whole(directory.path / ENVIRONMENT, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    if not (directory.path / "config.yaml").exists():
        write_whole(directory.path / "config.yaml", config_yaml)


def refuse_foreign_files(path: Path) -> None:
    """Raise RunDirectoryError if `path` is not a directory, or holds no run but other files."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file, not a directory", hint="Choose another --run.dir")
    if not path.exists() or (path / ENVIRONMENT).exists():
        return
    names = sorted(item.name for item in path.iterdir())
    if foreign := [name for name in names if name not in OWN_BEFORE_A_RUN and not name.startswith(".")]:
        raise RunDirectoryError(
            f"{path} is not empty and holds no run", where=", ".join(foreign[:5]), hint="Choose another --run.dir"
        )


def _read(environment: Path) -> tuple[str, dict[str, Any]]:
    """Return run id and mathematics from environment.json."""
    try:
        stored = json.loads(environment.read_text(encoding="utf-8"))
        return str(stored["run_id"]), dict(stored["mathematics"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"{environment} is damaged ({error})", hint="Restore the file, or choose another --run.dir"
        ) from None
