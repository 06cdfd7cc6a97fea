"""Export a run from its checkpoints; the run may be interrupted or still training and is not modified."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.checkpoint.reader import load_checkpoint
from resilient_t5.checkpoint.retention import find_best
from resilient_t5.config.schema import Config
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.prepare import store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import DataError, NoValidCheckpoint, RunDirectoryError
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import build_trained_model, original_tables, trained_ids
from resilient_t5.training.entrypoints.model_directory import CardFacts, export_parts, model_card, write_export
from resilient_t5.training.run_directory import ENVIRONMENT
from resilient_t5.training.saver import load_model_tensors
from resilient_t5.training.telemetry.metrics_log import read_rows

Which = Literal["best", "last"]


def export_run(config: Config, which: Which, directory: Path, license: str | None) -> str:
    """Export the run in `config.run.dir` to `directory`; returns the name of the checkpoint.

    Raises:
        RunDirectoryError: the directory contains no run.
        NoValidCheckpoint: the run has no intact checkpoint.
        DataError: the store or the pretrained model is missing, or the export fails its check.
        DiskFull, StorageError: a write failed.
    """
    run_directory = Path(config.run.dir)
    loaded = find_checkpoint(config, run_directory, which)
    store = Store.open(store_directory(config))
    corpus = Dataset.over(store, config)
    model = build_trained_model(config, corpus, torch.device("cpu"), Precision("fp32", "an export"), checkpointing=False)
    with torch.no_grad():
        load_model_tensors(model, loaded.tensors["model"])
    facts = facts_of(store, run_directory, which, loaded.state["run"], license)
    parts = export_parts(config, store, model, trained_ids(corpus, model), original_tables(config, store))
    write_export(parts, model_card(facts, config, parts.usage), directory)
    return loaded.name


def find_checkpoint(config: Config, run_directory: Path, which: Which) -> Loaded:
    """The best or newest intact checkpoint; damaged checkpoints are skipped and not moved."""
    environment = run_directory / ENVIRONMENT
    try:
        run_id = str(json.loads(environment.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{run_directory} is not a run directory", where=str(environment), hint="Give the run.dir of bin/train"
        ) from error
    manager = CheckpointManager(run_directory, run_id=run_id, settings=config.checkpoint, audit=lambda event, fields: None)
    candidates = list(manager.committed())
    while candidates:
        # Before the first evaluation there is no best checkpoint; export the newest one.
        candidate = (find_best(candidates, None) if which == "best" else None) or candidates[0]
        try:
            return load_checkpoint(manager.directory / candidate.name)
        except NoValidCheckpoint:
            candidates.remove(candidate)
    raise NoValidCheckpoint(
        f"{run_directory} has no intact checkpoint", where=str(manager.directory), hint="Continue training, then export again"
    )


def facts_of(store: Store, run_directory: Path, which: str, state: Mapping[str, Any], license: str | None = None) -> CardFacts:
    """Contents of the model card for the weights at `state`, the counters in the format of state.json.

    Reads only what the card needs, so that checkpoints of other versions can be exported.
    """
    try:
        command = str(json.loads((run_directory / ENVIRONMENT).read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{ENVIRONMENT} cannot be read: {error}", where=str(run_directory)) from error
    record = state["last"] if state["last"] is not None and state["last"]["update"] == state["update"] else None
    return CardFacts(
        which=which,
        record=record,
        before=state["before"],
        figures=restoration_row(run_directory, state["update"]),
        report=store.report,
        update=state["update"],
        target_tokens=state["target_tokens"],
        command=command,
        license=license,
    )


def restoration_row(run_directory: Path, update: int) -> dict[str, Any]:
    """The newest restoration row of metrics.jsonl for this update; empty if there is none."""
    rows = [row for row in read_rows(run_directory / "metrics.jsonl") if row["kind"] == "restoration"]
    return next((row for row in reversed(rows) if row["update"] == update), {})
