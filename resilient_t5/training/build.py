"""Build a run: `build_run` is the only place that constructs its parts, and puts into them what the run begins with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from resilient_t5.checkpoint import rng
from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.checkpoint.reader import load_checkpoint
from resilient_t5.checkpoint.writer import Writer
from resilient_t5.config.schema import Config, trajectory_sha256
from resilient_t5.data.batches import Batches, EvaluationBatch, Prefetcher, evaluation_batches
from resilient_t5.data.cooccurrence import count_neighbours
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.store import Split, Store
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.initial_weights import MAX_IDS, RANK, factored, set_initial_vectors
from resilient_t5.model.layers import install_lean_layers
from resilient_t5.model.load import SpecialIds, build_model, load_model
from resilient_t5.model.optimizer import build_optimizer
from resilient_t5.model.precision import Precision, install_float32_islands
from resilient_t5.model.vocabulary import FullTables, cut_vocabulary, tables_from, tables_of
from resilient_t5.restoration.filler import check_tokenizer_fits
from resilient_t5.restoration.scoring.baselines import MajorityBaseline
from resilient_t5.restoration.scoring.measure import Restorer
from resilient_t5.restoration.scoring.metrics import Glossary, count_terms
from resilient_t5.training.convergence.machine import ConvergenceMachine, Rules
from resilient_t5.training.evaluator import Evaluator
from resilient_t5.training.hardware.device import build_accelerator, build_device, compile_layers, settle_precision
from resilient_t5.training.hardware.machine import numeric_conditions, return_freed_memory_to_os, slept_s
from resilient_t5.training.hardware.memory_fit import Fit, fit_run
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup, sync_processes
from resilient_t5.training.hardware.sharding import ShardedModel, shard_model
from resilient_t5.training.run import Run, telemetry_from
from resilient_t5.training.saver import Saver, fingerprints_of
from resilient_t5.training.schedule import Plan, make_plan
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.metrics_log import AuditTrail
from resilient_t5.training.telemetry.timing import Timing
from resilient_t5.training.update import Updater


def restore_or_init(saver: Saver, loaded: Loaded | None, config: Config, train: Split, ranks: ProcessGroup) -> RunState:
    """The state that the run begins with, the same in every process."""
    state = restore_or_start(saver, loaded, config, train)
    same = {**saver.fingerprints, "settings": trajectory_sha256(config), "precision": saver.conditions["precision"]}
    sync_processes(ranks, saver.updater.model, same, is_new=loaded is None)
    return state


def restore_or_start(saver: Saver, loaded: Loaded | None, config: Config, train: Split) -> RunState:
    """The state of `loaded` put into the parts; or that of a new run, with the weights it forks from or begins with."""
    if loaded is not None:
        return saver.restore(loaded)
    if config.run.fork is not None:
        saver.load_weights(load_checkpoint(Path(config.run.fork)))
    elif config.model.name_or_path is None:
        place_vocabulary(saver.updater.model, train, config.run.seed)
    rng.start(config.run.seed)
    return RunState()


def place_vocabulary(model: T5Model, train: Split, seed: int) -> None:
    """Give the frequent pieces of a model from scratch the vectors that their neighbours in the training text suggest."""
    rows, width = model.shared.weight.shape
    found = count_neighbours(train, rows, MAX_IDS)
    vectors_nR = factored(found.row_ends, found.columns, found.values, min(RANK, width), seed)
    set_initial_vectors(model, found.ids, vectors_nR, seed)


# Padded tokens of a batch where nothing is trained, hence nothing planned.
MICRO_TOKENS = {"cpu": 2048, "cuda": 4096}
# A GPU's attention kernels want lengths in eights; a CPU only pays for the padding.
PAD_MULTIPLE = {"cpu": 1, "cuda": 8}


def build_run(
    config: Config,
    store: Store,
    manager: CheckpointManager,
    loaded: Loaded | None,
    audit: AuditTrail,
    display: Console,
    *,
    claim: Callable[[], None] = lambda: None,
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Construct every part of a run over a prepared store, as it stands in `loaded`, or at update 0.

    Args:
        claim: called when everything has proved to be usable, before the first byte is written into the run.
        ranks: the processes that train the run together; each of them builds all of it.

    Raises:
        ConfigError, DataError: a part cannot be built as it is configured.
        ResumeMismatch: `loaded` belongs to another run.
    """
    corpus = Dataset.over(store, config)
    device, precision, accelerator, (fit, model, sizes, batches) = resolve_device_and_memory(config, corpus, ranks)
    layers = shard_model(model, config, ranks, precision.name, is_new=loaded is None)
    optimizer = build_optimizer(layers, config.optim, device, precision.optimizer_dtype)
    updater = Updater(accelerator, layers, optimizer, config.optim, config.run.seed)
    plan, rules = make_plan_and_rules(config, batches)
    convergence, guard, ids = ConvergenceMachine(rules), SpikeGuard(plan.warmup_updates), trained_ids(corpus, model)
    writer, timing = Writer(manager, background=config.checkpoint.background), Timing()
    conditions = {"precision": precision.name, "compile": config.hardware.compile, "processes": ranks.count}
    conditions |= {"shard_layers": layers.is_sharded, **sizes, **numeric_conditions(device)}
    saver = Saver(writer, config, fingerprints_of(config, store, ids), conditions, updater, convergence, guard, timing)
    evaluator = build_evaluator(config, corpus, accelerator, layers, sizes)
    state = restore_or_init(saver, loaded, config, corpus.train, ranks)
    claim()
    telemetry = telemetry_from(state, config, ranks)
    audit.attach(telemetry, display)
    return Run(
        config=config,
        directory=Path(config.run.dir),
        device=device,
        precision=precision,
        fit=fit,
        store=store,
        trained_ids=ids,
        batches=batches,
        plan=plan,
        updater=updater,
        evaluator=evaluator,
        convergence=convergence,
        guard=guard,
        state=state,
        manager=manager,
        saver=saver,
        reader=Prefetcher(batches, state.attempted, config.batch.readers),
        telemetry=telemetry,
        audit=audit,
        display=display,
        timing=timing,
        ranks=ranks,
        slept_s=slept_s(),
    )


def make_plan_and_rules(config: Config, batches: Batches) -> tuple[Plan, Rules]:
    """The plan and the rules of stopping, in updates of these batches."""
    plan = make_plan(config.schedule, config.evaluation, batches.updates_per_epoch, batches.mean_target_tokens)
    return plan, Rules.from_config(config.convergence, plan.to_updates, config.evaluation)


Fitted = tuple[Fit, T5Model, dict[str, int], Batches]
"""What depends on the plan: the plan, the model, the sizes of micro-batches, and the batches."""


def resolve_device_and_memory(
    config: Config, corpus: Dataset, ranks: ProcessGroup
) -> tuple[torch.device, Precision, Accelerator, Fitted]:
    """Device and number format, tried on the first batches and given up for float32 where it fails, and what fits them."""
    device, precision, accelerator = build_device(config)
    parts = build_for_plan(config, corpus, device, precision, ranks)
    _, model, _, batches = parts
    found = settle_precision(config, model, batches, precision, device)
    if found.name != precision.name:
        accelerator = build_accelerator(found, device)
        parts = build_for_plan(config, corpus, device, found, ranks)
    return device, found, accelerator, parts


def build_for_plan(
    config: Config, corpus: Dataset, device: torch.device, precision: Precision, ranks: ProcessGroup = SINGLE_PROCESS
) -> Fitted:
    """Plan, then build what the plan says."""
    fit = fit_run(config, corpus.store, device, precision.name, ranks)
    model = build_trained_model(config, corpus, device, precision, checkpointing=fit.choice.checkpointing)
    if config.hardware.compile:
        compile_layers(model, device)
    sizes = batch_sizes(config, device, fit.choice.micro_tokens)
    return fit, model, sizes, Batches(corpus.train, corpus.table, config, seed=config.run.seed, **sizes)


def build_trained_model(
    config: Config, corpus: Dataset, device: torch.device, precision: Precision, *, checkpointing: bool
) -> T5Model:
    """The model with the rows that are trained, float32, on the device, in training mode."""
    model = build_full_model(config, corpus.store)
    if config.model.active_vocabulary == "corpus":
        cut_vocabulary(model, corpus.active_to_full)
    return prepare_for_training(model, device, precision, checkpointing=checkpointing)


def prepare_for_training(model: T5Model, device: torch.device, precision: Precision, *, checkpointing: bool) -> T5Model:
    """The same model on the device, in training mode, with lean layers and what checkpointing and number format need."""
    install_lean_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        if device.type == "cpu":
            return_freed_memory_to_os()  # who recomputes to save memory does not want it kept by the heap
    if precision.name == "fp16":
        install_float32_islands(model)
    model.to(device)  # type: ignore[arg-type]  # transformers types this method for pipelines only
    model.train()
    return model


def trained_ids(corpus: Dataset, model: T5Model) -> np.ndarray:
    """Full ids of the model's rows; a whole checkpoint may have more rows than its tokenizer has ids."""
    rows = model.shared.weight.shape[0]
    return corpus.active_to_full if rows == len(corpus.active_to_full) else np.arange(rows)


def build_full_model(config: Config, store: Store) -> T5Model:
    """The checkpoint, or the model from scratch, with every row that the tokenizer has ids for."""
    tokenizer = store.tokenizer
    if config.model.name_or_path is not None:
        model = load_model(config.model.name_or_path, config.model)
        check_tokenizer_fits(tokenizer, model, config.model.name_or_path)
        return model
    special = SpecialIds(tokenizer.pad_id, tokenizer.eos_id, decoder_start_id=tokenizer.pad_id)
    return build_model(config.model, vocabulary_rows=tokenizer.size, special=special, seed=config.run.seed)


def original_tables(config: Config, store: Store) -> FullTables:
    """The vocabulary tables from before training, for the rows that an export takes over unchanged."""
    if config.model.name_or_path is not None:
        return tables_from(config.model.name_or_path)
    return tables_of(build_full_model(config, store))


def batch_sizes(config: Config, device: torch.device, make_plan_and_rules: int | None = None) -> dict[str, int]:
    """Micro-batch budget and padding in tokens, `auto` resolved: to what was planned, or for the device where nothing was."""
    micro, multiple = config.batch.micro_tokens, config.batch.pad_multiple
    return {
        "micro_tokens": make_plan_and_rules or (MICRO_TOKENS[device.type] if micro == "auto" else int(micro)),
        "pad_multiple": PAD_MULTIPLE[device.type] if multiple == "auto" else multiple,
    }


def build_evaluator(
    config: Config, corpus: Dataset, accelerator: Accelerator, layers: ShardedModel, sizes: dict[str, int]
) -> Evaluator:
    """The fixed evaluation examples, in the order of their lengths, and what scores them."""

    def fixed(examples: int) -> list[EvaluationBatch]:
        return evaluation_batches(corpus.validation, corpus.table, config, examples=examples, seed=config.run.seed, **sizes)

    counts = count_terms(corpus.train.terms, len(corpus.store.terms))
    restorer = Restorer(
        split=corpus.validation,
        table=corpus.table,
        glossary=Glossary(corpus.store.terms, counts, corpus.decode),
        majority=MajorityBaseline.fit(corpus.train),
        task=config.corruption.task,
        max_target_tokens=config.data.max_target_tokens,
        samples=config.telemetry.samples,
    )
    asked = config.evaluation
    return Evaluator(accelerator, layers, fixed(asked.examples), fixed(asked.restore_examples), restorer, layers.ranks)
