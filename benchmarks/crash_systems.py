"""Five checkpointing systems that save after every update with their own documented calls, for benchmarks/crash.py.

All systems train the same T5 of 0.3 million parameters with AdamW. Every gradient is one, and every update sets torch's random
state. The whole state is therefore a function of the update number: one sha256 over weights, optimizer and random state shows
whether a resumed state belongs to the update that the system reports.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import ProjectConfiguration
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, TrainerCallback

from resilient_t5.checkpoint import rng
from resilient_t5.checkpoint.lock import RunLock
from resilient_t5.checkpoint.manager import CheckpointManager, Loaded, Parts
from resilient_t5.checkpoint.writer import Writer
from resilient_t5.config.schema import CheckpointConfig
from resilient_t5.model.optimizer import load_named_state, named_state
from resilient_t5.training.saver import load_model_tensors, model_tensors

RUN_ID = "0" * 32
FOREVER = 10**9

Acknowledge = Callable[[int], None]
Found = tuple[int, str]
"""Result of a resume: the update that the system reports, and the digest of the state."""


class Subject:
    """The model and its optimizer; `train_once` is one update."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = T5Config(vocab_size=1024, d_model=96, d_kv=16, d_ff=192, num_layers=2, num_heads=4)
        self.model = T5ForConditionalGeneration(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def train_once(self, update: int) -> None:
        """Run update number `update`, counted from one."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.manual_seed(update)

    def digest(self) -> str:
        """Sha256 over weights, optimizer state and torch's random state."""
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
            for key, value in sorted(self.optimizer.state[parameter].items()):
                digest.update(key.encode() + value.detach().numpy().tobytes())
        return digest.hexdigest()


def reference_digests(updates: int) -> list[str]:
    """Return the digests after updates 1 to `updates`."""
    subject, digests = Subject(), []
    for update in range(1, updates + 1):
        subject.train_once(update)
        digests.append(subject.digest())
    return digests


@dataclass(frozen=True)
class System:
    """One checkpointing system.

    `train(directory, acknowledge, saves)` saves after every update and acknowledges it when the save call has returned.
    `resume(directory, path)` is the resume call of a new process: on checkpoint `path`, or on the one that the system selects
    if `path` is None. `checkpoints(directory)` lists the checkpoints, oldest first.
    """

    name: str
    how: str
    train: Callable[[Path, Acknowledge, int], None]
    resume: Callable[[Path, Path | None], Found]
    checkpoints: Callable[[Path], list[Path]]


def numbered(directory: Path, pattern: str) -> list[Path]:
    """Return the entries whose name matches, sorted by the last number in the name."""
    found = [path for path in directory.glob("*") if re.fullmatch(pattern, path.name)]
    return sorted(found, key=lambda path: int(re.findall(r"\d+", path.name)[-1]))


# resilient_t5: the calls of bin/train around its loop, and the parts of a checkpoint


def our_manager(directory: Path, keep_last: int) -> CheckpointManager:
    """Return the checkpoint manager of a run; events are discarded."""
    settings = CheckpointConfig(keep_last=keep_last)
    return CheckpointManager(directory, run_id=RUN_ID, settings=settings, audit=lambda event, fields: None)


def train_ours(directory: Path, acknowledge: Acknowledge, saves: int) -> None:
    subject = Subject()
    with RunLock(directory):
        manager = our_manager(directory, 3)
        manager.sweep()
        writer = Writer(manager, background=True)
        for update in range(1, saves + 1):
            subject.train_once(update)
            writer.submit(ours_parts(subject, update), best=False, must=True)
            for committed in writer.drain():
                acknowledge(committed.update)


def ours_parts(subject: Subject, update: int) -> Parts:
    optimizer_tensors, optimizer_values = named_state(subject.optimizer, subject.model)
    random_tensors, random_values = rng.capture()
    return Parts(
        update=update,
        tensors={"model": model_tensors(subject.model), "optimizer": optimizer_tensors, "rng": random_tensors},
        state={"optimizer": optimizer_values, "rng": random_values},
        reason="periodic",
        health={"finite": True},
        fingerprints={},
    )


def resume_ours(directory: Path, path: Path | None) -> Found:
    subject = Subject()
    with RunLock(directory), torch.no_grad():
        manager = our_manager(directory, 3)
        manager.sweep()
        loaded: Loaded | None = manager.load_newest() if path is None else manager.load(path.name)
        if loaded is None:
            raise FileNotFoundError("no checkpoint")
        load_model_tensors(subject.model, loaded.tensors["model"])
        load_named_state(subject.optimizer, subject.model, loaded.tensors["optimizer"], loaded.state["optimizer"])
        rng.restore(loaded.tensors["rng"], loaded.state["rng"])
    return loaded.update, subject.digest()


# torch.save to one file


def train_torch_save(directory: Path, acknowledge: Acknowledge, saves: int) -> None:
    subject = Subject()
    for update in range(1, saves + 1):
        subject.train_once(update)
        state = {"model": subject.model.state_dict(), "optimizer": subject.optimizer.state_dict(), "update": update}
        torch.save({**state, "rng": torch.get_rng_state()}, directory / "state.pt")
        acknowledge(update)


def resume_torch_save(directory: Path, path: Path | None) -> Found:
    subject = Subject()
    state = torch.load(path or directory / "state.pt")
    subject.model.load_state_dict(state["model"])
    subject.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["update"], subject.digest()


# Accelerate: save_state and load_state with automatic naming


class Counter:
    """The update number, registered for checkpointing."""

    def __init__(self) -> None:
        self.update = 0

    def state_dict(self) -> dict[str, int]:
        return {"update": self.update}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.update = state["update"]


def prepared(directory: Path, total_limit: int) -> tuple[Subject, accelerate.Accelerator, Counter]:
    """Set up Accelerate as its checkpointing guide does."""
    subject, counter = Subject(), Counter()
    project = ProjectConfiguration(str(directory), automatic_checkpoint_naming=True, total_limit=total_limit)
    accelerator = accelerate.Accelerator(cpu=True, project_config=project)
    accelerator.prepare(subject.model, subject.optimizer)
    accelerator.register_for_checkpointing(counter)
    return subject, accelerator, counter


def train_accelerate(directory: Path, acknowledge: Acknowledge, saves: int, total_limit: int) -> None:
    subject, accelerator, counter = prepared(directory, total_limit)
    for update in range(1, saves + 1):
        subject.train_once(update)
        counter.update = update
        accelerator.save_state()
        acknowledge(update)


def resume_accelerate(directory: Path, path: Path | None) -> Found:
    subject, accelerator, counter = prepared(directory, 3)
    accelerator.load_state(None if path is None else str(path))
    return counter.update, subject.digest()


# Seq2SeqTrainer: save_steps=1 and resume_from_checkpoint


class OnesTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer whose loss has gradient one for every parameter."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return sum(parameter.sum() for parameter in model.parameters())


class SaveCallback(TrainerCallback):
    """Set the random state like `train_once`, acknowledge saves, and call `on_start` before every update."""

    def __init__(self, acknowledge: Acknowledge | None, on_start: Callable[[int], None] | None):
        self.acknowledge, self.on_start = acknowledge, on_start

    def on_step_begin(self, args, state, control, **more):
        if self.on_start is not None:
            self.on_start(state.global_step)

    def on_step_end(self, args, state, control, **more):
        torch.manual_seed(state.global_step)

    def on_save(self, args, state, control, **more):
        if self.acknowledge is not None:
            self.acknowledge(state.global_step)


def make_trainer(directory: Path, saves: int, total_limit: int, callback: SaveCallback) -> tuple[Subject, OnesTrainer]:
    subject = Subject()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(directory),
        save_strategy="steps",
        save_steps=1,
        save_total_limit=total_limit,
        max_steps=saves,
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    examples = [{"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([5, 1])}] * 1000
    constant = torch.optim.lr_scheduler.LambdaLR(subject.optimizer, lambda update: 1.0)
    optimizers = (subject.optimizer, constant)
    return subject, OnesTrainer(subject.model, arguments, train_dataset=examples, optimizers=optimizers, callbacks=[callback])


def train_trainer(directory: Path, acknowledge: Acknowledge, saves: int, total_limit: int) -> None:
    make_trainer(directory, saves, total_limit, SaveCallback(acknowledge, None))[1].train()


class Resumed(Exception):
    """Raised before the first update after a resume, to end training."""


def resume_trainer(directory: Path, path: Path | None) -> Found:
    resumed: list[Found] = []

    def on_start(update: int) -> None:
        resumed.append((update, subject.digest()))
        raise Resumed

    subject, trainer = make_trainer(directory, FOREVER, 3, SaveCallback(None, on_start))
    with contextlib.suppress(Resumed):
        trainer.train(resume_from_checkpoint=True if path is None else str(path))
    return resumed[0]


# torch.distributed.checkpoint: one folder per save; the newest with .metadata is loaded, as in torchtitan


def dcp_state(subject: Subject, update: int) -> dict:
    model, optimizer = get_state_dict(subject.model, subject.optimizer)
    return {"model": model, "optimizer": optimizer, "update": update, "rng": torch.get_rng_state()}


def train_dcp(directory: Path, acknowledge: Acknowledge, saves: int) -> None:
    subject = Subject()
    for update in range(1, saves + 1):
        subject.train_once(update)
        dcp.save(dcp_state(subject, update), checkpoint_id=str(directory / f"step-{update}"))
        acknowledge(update)
        for old in numbered(directory, r"step-\d+")[:-3]:
            shutil.rmtree(old)


def resume_dcp(directory: Path, path: Path | None) -> Found:
    subject = Subject()
    if path is None:
        path = [folder for folder in numbered(directory, r"step-\d+") if (folder / ".metadata").exists()][-1]
    state = dcp_state(subject, 0)
    dcp.load(state, checkpoint_id=str(path))
    set_state_dict(subject.model, subject.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["update"], subject.digest()


def accelerate_with(limit: int) -> System:
    return System(
        f"accelerate_limit_{limit}",
        f"Accelerator.save_state, total_limit={limit}; load_state()",
        lambda directory, acknowledge, saves: train_accelerate(directory, acknowledge, saves, limit),
        resume_accelerate,
        lambda directory: numbered(directory / "checkpoints", r"checkpoint_\d+"),
    )


def trainer_with(limit: int) -> System:
    return System(
        f"seq2seq_trainer_limit_{limit}",
        f"Seq2SeqTrainer, save_steps=1, save_total_limit={limit}; resume_from_checkpoint=True",
        lambda directory, acknowledge, saves: train_trainer(directory, acknowledge, saves, limit),
        resume_trainer,
        lambda directory: numbered(directory, r"checkpoint-\d+"),
    )


SYSTEMS = (
    System(
        "resilient_t5",
        "lock, sweep, manager and background writer as in bin/train, keep_last=3; load_newest",
        train_ours,
        resume_ours,
        lambda directory: numbered(directory / "checkpoints", r"u\d+-\d+"),
    ),
    System(
        "torch_save",
        "torch.save to one file; torch.load",
        train_torch_save,
        resume_torch_save,
        lambda directory: [path for path in [directory / "state.pt"] if path.exists()],
    ),
    accelerate_with(1),
    accelerate_with(3),
    trainer_with(1),
    trainer_with(3),
    System(
        "dcp_folders",
        "torch.distributed.checkpoint, one folder per save, last 3 kept; newest with .metadata, dcp.load",
        train_dcp,
        resume_dcp,
        lambda directory: numbered(directory, r"step-\d+"),
    ),
)
