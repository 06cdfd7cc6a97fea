"""Stages with bin/train: the quickstart, a T5 from scratch, and a resume after SIGKILL with deterministic kernels."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.card_stages.inputs import MIB, NoSpace, setup_of, short_store
from benchmarks.card_stages.session import Session
from benchmarks.card_stages.sides import measure_config, measure_ours
from benchmarks.card_stages.speed import SEED, WARM_S
from benchmarks.killed_run import read_rows, starts, tensors
from benchmarks.peers.setup import Setup
from resilient_t5.config.parse import config_text
from resilient_t5.config.schema import Config
from resilient_t5.config.sections import CheckpointConfig, ModelConfig, OptimConfig, ScheduleConfig, TelemetryConfig
from resilient_t5.model.load import shape_of
from resilient_t5.model.shapes import sizes_of_shape

ROOT = Path(__file__).resolve().parents[2]
SCRATCH_TIME_S = 15.0
KILL_POLL_S = 0.02
KEPT = 2
"""Checkpoints that a run keeps in addition to the best."""
CHECKPOINT_BYTES, EXPORT_BYTES = 12, 8
"""Of a parameter: weights and two moments in float32; two exports."""
PRICE_UPDATES = 20
SCRATCH_OPTIM = OptimConfig(name="muon", lr=6e-4, beta2=0.98)
"""The optimizer of configs/zh-medical-cpu.yaml, a model from scratch."""


def quickstart(session: Session, stage: str) -> None:
    """Record the wall time of the quickstart, from the start of the command to its end."""
    with session.scratch() as folder:
        run = folder / "run"
        settings = [*session.sizes.quickstart, "--run.dir", str(run), "--hardware.device", session.device]
        arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml"), *settings, "--telemetry.progress", "plain"]
        started_s = time.monotonic()
        outcome = session.run(run_train, arguments)
        wall_s = time.monotonic() - started_s
        rows = [row for row in read_rows(run) if row["kind"] == "train"]
        figures: dict[str, Any] = {"command_s": round(wall_s, 1), "updates": rows[-1]["update"] if rows else 0}
        if not outcome.done:
            session.record(stage, figures)
            raise RuntimeError(f"the quickstart {outcome.reason}, at update {figures['updates']} of 1000")
        if outcome.value:
            raise RuntimeError(f"the quickstart ended with exit code {outcome.value}; see the log")
        if (run / "summary.json").exists():
            done = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            figures |= {"exit_code": outcome.value, "best": done["best"], "training_s": round(done["wall_s"], 1)}
        session.record(stage, figures)
        session.say(f"  {wall_s:.0f} s, exit code {outcome.value}")


def run_train(arguments: list[str]) -> int:
    """Run bin/train as a user does, and return its exit code. Runs in a new process."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "bin" / "train"), *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode


def from_scratch(session: Session, stage: str) -> None:
    """Record the speed of a T5 from scratch with large updates."""
    sizes = session.sizes
    with session.scratch() as folder:
        config = own_config(session, folder / "run", sizes.scratch_model)
        config = dataclasses.replace(
            config,
            optim=SCRATCH_OPTIM,
            batch=dataclasses.replace(config.batch, examples_per_update=sizes.scratch_examples),
        )
        time_s = min(SCRATCH_TIME_S, 2 * sizes.time_s)
        outcome = session.run(measure_config, config, sizes.scratch_updates, 2, time_s, session.deadline_s())
    if not outcome.done:
        raise RuntimeError(outcome.reason)
    figures = outcome.value
    tokens = figures["source_tokens"] + figures["target_tokens"]
    record = {
        "parameters": figures["parameters"],
        "optimizer": SCRATCH_OPTIM.name,
        "examples_per_update": sizes.scratch_examples,
        "updates": figures["updates"],
        "update_s": round(figures["wall_s"] / figures["updates"], 4),
        "tokens_per_s": round(tokens / figures["wall_s"]),
        "useful_token_share": figures["useful_token_share"],
        "micro_batches_per_update": figures["micro_batches_per_update"],
        "peak_mib": round(figures["peak_mib"], 1),
    }
    session.record(stage, record)
    session.say(f"  {record['parameters'] / 1e6:.0f} M parameters: {record['tokens_per_s']} tokens/s")


def own_config(session: Session, run: Path, model: ModelConfig) -> Config:
    """The configuration of a model from scratch over the short texts."""
    texts = short_store(session)
    setup = Setup(str(texts.store), "", str(run), texts.data, session.device, None, updates=0, script_updates=0, warm_updates=0)
    return dataclasses.replace(setup.config(SEED), model=model, tokenizer=texts.tokenizer)


def resume(session: Session, stage: str) -> None:
    """Compare a run that is killed and resumed with one that is not, by the bits of its tensors; then the price of it."""
    updates = session.sizes.resume_updates
    _require_space(session)
    with session.scratch() as folder:
        alone, killed = (_write_config(session, folder / name, updates) for name in ("alone", "killed"))
        outcome = session.run(train_in_process, alone)
        if not outcome.done or outcome.value:
            raise RuntimeError(f"the run without a kill {outcome.reason or f'ended with {outcome.value}'}")
        hit = kill_halfway(session, killed, folder / "killed" / "run", updates)
        outcome = session.run(train_in_process, killed)
        if not outcome.done or outcome.value:
            raise RuntimeError(f"the resumed run {outcome.reason or f'ended with {outcome.value}'}")
        expected, actual = (tensors(folder / name / "run") for name in ("alone", "killed"))
        begun = [row["resumed_from"] for row in read_rows(folder / "killed" / "run") if row["kind"] == "start"]
    different = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    record = {"updates": updates, "killed_at_update": hit, "resumed_from": begun[-1], "sha256": expected}
    session.record(stage, record | {"different": different, "identical": not different})
    session.say(f"  killed at update {hit}, resumed from {begun[-1]}: {different or 'equal bit for bit'}")
    if session.on_gpu:
        session.record(stage, {"deterministic_price": _price(session)})


def _require_space(session: Session) -> None:
    """Raise NoSpace if the checkpoints and exports of both runs do not fit on the disk."""
    rows = session.result["texts"]["short"]["rows_that_ours_trains"] if "texts" in session.result else session.sizes.pieces
    parameters = sizes_of_shape(shape_of(session.sizes.scratch_model), rows).parameters
    needed = 2 * parameters * ((KEPT + 1) * CHECKPOINT_BYTES + EXPORT_BYTES)
    if (free := shutil.disk_usage(session.folder).free) < needed:
        raise NoSpace(f"needs {needed / MIB:.0f} MiB for checkpoints, {free / MIB:.0f} MiB are free. Set --out to another disk")


def _write_config(session: Session, folder: Path, updates: int) -> str:
    """Write the configuration of a short deterministic run in `folder`/run; return its file."""
    folder.mkdir(parents=True)
    config = own_config(session, folder / "run", session.sizes.scratch_model)
    config = dataclasses.replace(
        config,
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(max_updates=updates, shape="constant", warmup=2),
        evaluation=dataclasses.replace(config.evaluation, every=updates, examples=8),
        checkpoint=CheckpointConfig(every_minutes=None, every_updates=max(1, updates // 4), keep_last=KEPT),
        telemetry=TelemetryConfig(log_every=1, progress="plain", tensorboard=False),
        hardware=dataclasses.replace(config.hardware, deterministic=True),
    )
    path = folder / "config.yaml"
    path.write_text(config_text(config), encoding="utf-8")
    return str(path)


def train_in_process(config_file: str) -> int:
    """Run bin/train in this process, without importing everything again. Runs in a new process."""
    from resilient_t5.commands.train import main

    return int(main(["--config", config_file]))


def kill_halfway(session: Session, config_file: str, run: Path, updates: int) -> int:
    """Start the run, end it by SIGKILL after half of its updates, and return the number of the last one.

    Raises:
        RuntimeError: it ended before that.
    """
    with session.start(train_in_process, config_file) as child:
        while session.left_s > 0 and child.process.is_alive():
            done = max((row["update"] for row in read_rows(run) if row["kind"] == "train"), default=0)
            saved = any((run / "checkpoints").glob("u*-*")) if run.exists() else False
            if done >= updates // 2 and saved and starts(run):
                child.kill()
                return int(done)
            time.sleep(KILL_POLL_S)
    raise RuntimeError("the run to be killed ended, or the time did, before half of its updates")


def _price(session: Session) -> dict[str, Any]:
    """Seconds of an update with deterministic kernels, relative to those without; mT5-small, short texts."""
    with session.scratch() as folder:
        setup = setup_of(session, "mt5-small", folder)
        update_s = {}
        for name, deterministic in (("usual", False), ("deterministic", True)):
            own = dataclasses.replace(
                setup, scratch=str(folder / name), deterministic=deterministic, updates=PRICE_UPDATES, time_s=setup.time_s
            )
            outcome = session.run(measure_ours, own, SEED, WARM_S)
            if not outcome.done:
                return {"failed": f"{name}: {outcome.reason}"}
            update_s[name] = outcome.value["wall_s"] / outcome.value["updates"]
    ratio = update_s["deterministic"] / update_s["usual"]
    session.say(f"  deterministic kernels: {ratio:.2f} times the time of an update")
    return {f"{name}_update_s": round(value, 5) for name, value in update_s.items()} | {"ratio": round(ratio, 3)}
