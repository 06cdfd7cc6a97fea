"""Whether a resume would change the mathematics of a run: compare its former settings with the present ones.

The settings of a run are in environment.json and in every checkpoint; both are checked here. What a resume may change is
`FREE_KEYS` of config/schema.py.
"""

from collections.abc import Sequence
from typing import Any

from resilient_t5.config.schema import REMOVED_KEYS, Config, trajectory_settings
from resilient_t5.errors import ResumeMismatch


def refuse_changed_settings(
    old: dict[str, Any], config: Config, what: str, *, hint: str, other_changes: Sequence[str] = ()
) -> None:
    """Raise ResumeMismatch if `config` would change the mathematics of a run saved with `old`.

    Args:
        old: the trajectory settings of the run.
        config: the present configuration.
        what: the message; the changed keys are added.
        hint: what the user can do.
        other_changes: differences that are not settings; any of them is refused as well.
    """
    if changed := [*changed_trajectory_settings(old, config), *other_changes]:
        raise ResumeMismatch(what, where="; ".join(changed), hint=hint)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every value that differs."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def changed_trajectory_settings(old: dict[str, Any], config: Config) -> list[str]:
    """Return `key: old -> new` for every setting that would change the mathematics of a run saved with `old`.

    A key of a later version is missing in `old` and had its default; a key that a later version dropped is ignored.
    """
    new = trajectory_settings(config)
    former = {**trajectory_settings(Config()), **old}
    return changed_keys({key: value for key, value in former.items() if key in new}, new)


def changed_conditions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every condition of bit-exact results that differs from that of a checkpoint.

    Checkpoints of earlier versions lack `shard_layers`, `packed` and `graphs`, which were off, and have `compile`, which counts
    only if it was on.
    """
    former = old | {key: False for key in ("shard_layers", "packed", "graphs") if key in new and key not in old}
    return changed_keys({key: value for key, value in former.items() if (key, value) != ("compile", False)}, new)


def removed_settings(old: dict[str, Any]) -> list[str]:
    """`key: old -> removed` for every setting of a run saved with `old` that had an effect and no longer exists."""
    effective = [key for key, removed in REMOVED_KEYS.items() if key in old and old[key] not in removed.inert]
    return [f"{key}: {old[key]} -> removed" for key in effective]
