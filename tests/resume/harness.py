"""What the attacks on a run share: tiny real runs with everything in them that could drift, and their digests.

A digest covers what a run is: weights, optimizer, random states, counters, convergence, guard, the metric rows that do not
depend on the clock, and both exports. Two runs are the same run when their digests are equal, name by name.
"""

import argparse
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

CLOCK = ("_s", "_per_s", "_mib", "_share")
NOT_OF_THE_RUN = ("wall_s",)
ROW_KINDS = ("train", "evaluation", "restoration", "phase")

CONFIG = """
data: {train: "builtin:clinical", sample_notes: 100, max_source_tokens: 96, max_target_tokens: 48, validation_share: 0.2}
tokenizer: {train_vocab_size: 700}
corruption: {max_sentinels: 10}
model: {preset: tiny, dropout: 0.1}
batch: {examples_per_update: 8, micro_tokens: 300, window_updates: 3}
optim: {lr: 0.002}
schedule: {max_updates: 18}
convergence: {preset: short}
evaluation: {every: 5, examples: 8, restore_examples: 2}
checkpoint: {every_minutes: null, every_updates: 2}
telemetry: {log_every: 3, progress: plain, samples: 1, tensorboard: false}
hardware: {threads: 1}
run: {seed: 7}
"""
"""Dropout, several micro-batches an update, masks drawn anew, three epochs, rows that sum over updates with a save between."""


class Arena:
    """A folder with a configuration and a store that all runs of an attack share."""

    def __init__(self, server, folder, config=CONFIG):
        self.server, self.folder = server, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "config.yaml"
        self.config.write_text(config, encoding="utf-8")

    def argv(self, name, *more):
        """The command line of the run `name`."""
        return ["--config", self.config, "--data.store", self.folder / "store", "--run.dir", self.folder / name, *more]

    def console(self, name):
        """The file that takes the console of all processes of the run `name`."""
        return self.folder / f"{name}.txt"

    def finish(self, name, *more, before=None):
        """Run `name` to its end; its directory."""
        status = self.server.run(self.argv(name, *more), self.console(name), before)
        assert status == 0, f"exit {status}: {self.console(name).read_text()[-2000:]}"
        return self.folder / name


def newest_checkpoint(run):
    """The directory with the highest commit number."""
    return max((Path(run) / "checkpoints").glob("u*-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def digest(run):
    """{what: sha256} of all that must not depend on interruptions."""
    run, checkpoint = Path(run), newest_checkpoint(run)
    state = json.loads((checkpoint / "state.json").read_text())
    counters = {key: value for key, value in state["run"].items() if key not in NOT_OF_THE_RUN}
    return {
        "update": checkpoint.name.partition("-")[0],
        **{f"tensors/{path.stem}": tensor_sha256(path) for path in sorted(checkpoint.glob("*.safetensors"))},
        "counters": sha256(counters),
        "order": state["run"]["order_sha256"],
        **{key: sha256(state[key]) for key in ("convergence", "guard", "optimizer", "rng", "scaler", "mathematics")},
        **{f"{kind} rows": sha256(metric_rows(run, kind)) for kind in ROW_KINDS},
        **{f"export/{name}": tensor_sha256(run / "export" / name / "model.safetensors") for name in ("best", "last")},
    }


def differences(run, reference):
    """Names of what differs between two runs."""
    one, other = digest(run), digest(reference)
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def tensor_sha256(path):
    """Hash of every tensor of a file by name, dtype, shape and bytes."""
    whole = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.reshape(-1).view(dtype_of_bytes()).numpy().tobytes())
    return whole.hexdigest()


def dtype_of_bytes():
    """torch.uint8; imported late, since a fork server's parent needs no torch."""
    import torch

    return torch.uint8


def sha256(value):
    """Hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def whole_rows(run):
    """Rows written so far; the last line may be half."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def metric_rows(run, kind):
    """Metric rows of one kind without what depends on the clock or the machine."""
    return [
        {key: value for key, value in row.items() if key != "time" and not key.endswith(CLOCK)}
        for row in whole_rows(run)
        if row["kind"] == kind
    ]


def committed_update(run):
    """The update of the newest checkpoint; -1 without one."""
    names = list((Path(run) / "checkpoints").glob("u*-*"))
    return int(newest_checkpoint(run).name[1:].partition("-")[0]) if names else -1


@contextmanager
def scratch(given=None):
    """`given`, or a temporary folder, in memory where the machine has such a place."""
    if given is not None:
        yield Path(given)
        return
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def main(attack, *numbers):
    """Run one attack as a program: `attack(server, folder, **numbers)`; prints its figures as the last line.

    `numbers` are (name, default).
    """
    from tests.forkserver import ForkServer

    parser = argparse.ArgumentParser(description=attack.__doc__)
    for name, default in numbers:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scratch", default=None, help="folder to work in; default: a temporary one")
    given = vars(parser.parse_args())
    folder = given.pop("scratch")
    with ForkServer() as server, scratch(folder) as place:
        figures, failures = attack(server, place, **given)
    print(json.dumps(figures))
    return 1 if failures else 0
