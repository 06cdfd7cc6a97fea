"""Export a run from its checkpoints, also while it is interrupted or still training; the run is only read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.checkpoint.reader import load_checkpoint
from resilient_t5.checkpoint.retention import Stored, find_best
from resilient_t5.config.schema import Config
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.prepare import store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import DataError, NoValidCheckpoint, RunDirectoryError
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import build_trained_model, original_tables, trained_ids
from resilient_t5.training.entrypoints.model_card import CardFacts, model_card
from resilient_t5.training.entrypoints.model_directory import exported, write_export
from resilient_t5.training.run_directory import ENVIRONMENT
from resilient_t5.training.saver import load_model_tensors
from resilient_t5.training.telemetry.metrics_log import read_rows

Which = Literal["best", "last"]


def export_run(config: Config, which: Which, directory: Path, license: str | None) -> str:
    """Write an export of the run of `config.run.dir` to `directory`; returns the name of the checkpoint it was made of.

    Raises:
        RunDirectoryError: there is no run.
        NoValidCheckpoint: none of its checkpoints is whole.
        DataError: its store or the checkpoint it started from is gone, or the export fails its check.
        DiskFull, StorageError: the file system refuses.
    """
    run_directory = Path(config.run.dir)
    loaded = find_checkpoint(config, run_directory, which)
    store = Store.open(store_directory(config))
    corpus = Dataset.over(store, config)
    model = build_trained_model(config, corpus, torch.device("cpu"), Precision("fp32", "an export"), checkpointing=False)
    with torch.no_grad():
        load_model_tensors(model, loaded.tensors["model"])
    facts = facts_of(store, run_directory, which, loaded.state["run"], license)
    parts = exported(config, store, model, trained_ids(corpus, model), original_tables(config, store))
    write_export(parts, model_card(facts, config, parts.usage), directory)
    return loaded.name


def find_checkpoint(config: Config, run_directory: Path, which: Which) -> Loaded:
    """The best or the newest checkpoint that is whole; damaged ones are passed over and left where they are."""
    environment = run_directory / ENVIRONMENT
    try:
        run_id = str(json.loads(environment.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{run_directory} holds no run", where=str(environment), hint="Name the directory that bin/train wrote"
        ) from error
    manager = CheckpointManager(run_directory, run_id=run_id, settings=config.checkpoint, audit=lambda event, fields: None)
    left = list(manager.committed())
    while candidate := _next(left, which):
        try:
            return load_checkpoint(manager.directory / candidate.name)
        except NoValidCheckpoint:
            left.remove(candidate)
    raise NoValidCheckpoint(
        f"{run_directory} has no whole checkpoint yet", where=str(manager.directory), hint="Train on, then export again"
    )


def _next(left: list[Stored], which: Which) -> Stored | None:
    if which == "last":
        return left[0] if left else None
    # Before the first evaluation there is no best; the newest weights are all there is.
    return find_best(left, None) or (left[0] if left else None)


def facts_of(store: Store, run_directory: Path, which: str, state: Mapping[str, Any], license: str | None = None) -> CardFacts:
    """What the card tells of weights at `state`, the counters as state.json holds them.

    Only what the card needs is read, so that the checkpoint of another version can be exported.
    """
    record = state["last"] if state["last"] is not None and state["last"]["update"] == state["update"] else None
    return CardFacts(
        which=which,
        record=record,
        before=state["before"],
        figures=restoration_row(run_directory, state["update"]),
        report=store.report,
        update=state["update"],
        target_tokens=state["target_tokens"],
        command=command_of(run_directory),
        license=license,
    )


def restoration_row(run_directory: Path, update: int) -> dict[str, Any]:
    """The newest restoration row of metrics.jsonl for this update; empty when there is none."""
    rows = [row for row in read_rows(run_directory / "metrics.jsonl") if row["kind"] == "restoration"]
    return next((row for row in reversed(rows) if row["update"] == update), {})


def command_of(run_directory: Path) -> str:
    """The command line that started the run."""
    try:
        return str(json.loads((run_directory / ENVIRONMENT).read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{ENVIRONMENT} cannot be read: {error}", where=str(run_directory)) from error
