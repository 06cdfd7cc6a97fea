"""Build a run: construct its parts and set their initial state."""

import time
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
from resilient_t5.data.packing import Packing
from resilient_t5.data.pass_input import CopyAhead
from resilient_t5.data.ragged import Split
from resilient_t5.data.store.store import Store
from resilient_t5.model.dropout import seed_dropout
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.initial_weights import MAX_IDS, RANK, factored, set_initial_vectors
from resilient_t5.model.layers import allocate_buffers, install_lean_layers
from resilient_t5.model.load import SpecialIds, build_model, load_model
from resilient_t5.model.memory import GIB, Task
from resilient_t5.model.operands import StaticBuffers
from resilient_t5.model.optimizer import AdafactorInBackward, build_optimizer
from resilient_t5.model.precision import DTYPES, Precision, install_float32_islands
from resilient_t5.model.vocabulary import FullTables, cut_vocabulary, tables_from, tables_of
from resilient_t5.restoration.filler import check_tokenizer_fits
from resilient_t5.restoration.scoring.baselines import MajorityBaseline
from resilient_t5.restoration.scoring.measure import Restorer
from resilient_t5.restoration.scoring.metrics import Glossary, count_terms
from resilient_t5.training.convergence.machine import ConvergenceMachine, Rules
from resilient_t5.training.evaluator import Evaluator
from resilient_t5.training.hardware.device import build_accelerator, build_device, settle_precision
from resilient_t5.training.hardware.graphs import capture
from resilient_t5.training.hardware.machine import numeric_conditions, return_freed_memory_to_os
from resilient_t5.training.hardware.memory_fit import Fit, fit_run, task_of
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup, sync_processes
from resilient_t5.training.hardware.sharding import ShardedModel, shard_model
from resilient_t5.training.out_of_memory import MemoryGuard
from resilient_t5.training.recovery import Recovery
from resilient_t5.training.run import Run
from resilient_t5.training.saver import Saver, fingerprints_of
from resilient_t5.training.schedule import Plan, make_plan
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.telemetry.timing import Timing
from resilient_t5.training.update import Updater


def set_initial_state(saver: Saver, loaded: Loaded | None, config: Config, train: Split, group: ProcessGroup) -> None:
    """Restore `loaded`; or start a new run, from the weights of `run.fork` if it is set. All ranks end up with equal state."""
    if loaded is not None:
        saver.restore(loaded)
    else:
        if config.run.fork is not None:
            saver.load_weights(load_checkpoint(Path(config.run.fork)))
        elif config.model.name_or_path is None:
            place_vocabulary(saver.updater.model, train, config.run.seed)
        rng.start(config.run.seed)
    same = {**saver.fingerprints, "settings": trajectory_sha256(config), "precision": saver.conditions["precision"]}
    sync_processes(group, saver.updater.model, same, is_new=loaded is None)


def place_vocabulary(model: T5Model, train: Split, seed: int) -> None:
    """Initialize the embeddings of frequent tokens from their co-occurrences in the training text."""
    rows, width = model.shared.weight.shape
    counts = count_neighbours(train, rows, MAX_IDS)
    vectors_nR = factored(counts.row_ends, counts.columns, counts.values, min(RANK, width), seed)
    set_initial_vectors(model, counts.ids, vectors_nR, seed)


# Padded tokens per batch if nothing is trained, so that there is no memory plan.
MICRO_TOKENS = {"cpu": 2048, "cuda": 4096}
# GPU attention kernels need multiples of eight; on a CPU padding is only a cost.
PAD_MULTIPLE = {"cpu": 1, "cuda": 8}


def build_run(
    config: Config,
    store: Store,
    manager: CheckpointManager,
    loaded: Loaded | None,
    log: RunLog,
    *,
    claim: Callable[[], None] = lambda: None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Run:
    """Construct every part of a run over a prepared store, in the state of `loaded` or at update 0.

    Args:
        claim: called when all parts are built, before the first byte is written into the run directory.
        group: the processes that train the run together; each of them builds all parts.

    Raises:
        ConfigError, DataError: a part cannot be built with these settings.
        ResumeMismatch: `loaded` belongs to another run.
    """
    corpus = Dataset.over(store, config)
    device, precision, accelerator, (fit, model, sizes, batches) = resolve_device_and_memory(config, corpus, group)
    sharded = shard_model(model, config, group, precision.name, is_new=loaded is None)
    updater, graphs_note = build_updater(config, accelerator, sharded, precision, fit, batches)
    plan, rules = make_plan_and_rules(config, batches)
    convergence, guard, state, timing = ConvergenceMachine(rules), SpikeGuard(plan.warmup_updates), RunState(), Timing()
    ids, writer = trained_ids(corpus, model), Writer(manager, background=config.checkpoint.background)
    conditions = {"precision": precision.name, "processes": group.count, "shard_layers": sharded.is_sharded, **sizes}
    conditions |= {"packed": batches.packing is not None, "graphs": updater.graphs is not None, **numeric_conditions(device)}
    saver = Saver(writer, config, fingerprints_of(config, store, ids), conditions, updater, convergence, guard, state, timing)
    evaluator = build_evaluator(config, corpus, accelerator, sharded, sizes)
    set_initial_state(saver, loaded, config, corpus.train, group)
    claim()
    log.open_at(state)
    copy_ahead = CopyAhead(device) if device.type == "cuda" else None
    prefetcher = Prefetcher(batches, state.attempted, config.batch.readers, copy_ahead)
    return Run(
        config=config,
        device=device,
        precision=precision,
        fit=fit,
        plan=plan,
        store=store,
        trained_ids=ids,
        updater=updater,
        convergence=convergence,
        guard=guard,
        state=state,
        batches=batches,
        prefetcher=prefetcher,
        memory_guard=MemoryGuard(updater, batches, prefetcher, fit, precision.name, conditions, log),
        evaluator=evaluator,
        manager=manager,
        saver=saver,
        recovery=Recovery(saver, manager, prefetcher, plan, log),
        log=log,
        timing=timing,
        group=group,
        graphs_note=graphs_note,
    )


def build_updater(
    config: Config, accelerator: Accelerator, sharded: ShardedModel, precision: Precision, fit: Fit, batches: Batches
) -> tuple[Updater, str]:
    """Build the updater with its optimizer, static buffers and CUDA graphs; and the line of the banner about graphs.

    Graphs are captured before the weights are set, which happens in place: a resume then compares whether there are graphs,
    and restores the random streams afterwards.
    """
    optimizer = build_optimizer(sharded, config.optim, accelerator.device, precision.optimizer_dtype)
    static = runs_static_shapes(accelerator.device, batches)
    buffers = allocate_static_buffers(sharded, optimizer, precision, fit, static)
    updater = Updater(accelerator, sharded, optimizer, config.optim, config.run.seed, buffers, static)
    return updater, capture_graphs(updater, batches.shapes, config, fit)


def runs_static_shapes(device: torch.device, batches: Batches) -> bool:
    """Whether passes run as a GPU needs them: without a host sync, and with dropout drawn by kernels."""
    return device.type == "cuda" or batches.packing is not None


def allocate_static_buffers(
    sharded: ShardedModel, optimizer: torch.optim.Optimizer, precision: Precision, fit: Fit, static: bool
) -> StaticBuffers | None:
    """Allocate gradients and, if planned, copies of the weights.

    None if neither a GPU nor copies need them, with sharded layers, and with gradients that are freed in the backward pass.
    """
    needed = static or fit.choice.copies
    if not needed or sharded.is_sharded or isinstance(optimizer, AdafactorInBackward):
        return None
    return allocate_buffers(sharded.model, DTYPES[precision.name] if fit.choice.copies else None)


def capture_graphs(updater: Updater, shapes: list[tuple[int, int, int]], config: Config, fit: Fit) -> str:
    """Capture a CUDA graph for each shape under `hardware.graphs`; return a line for the banner, or "" if there is none.

    Nothing is captured on a CPU, with unpacked rows, sharded layers or recomputed activations, or if it was switched off.
    Graphs are dropped if the memory that they keep is missing for the optimizer and evaluation.
    """
    if config.hardware.graphs is False or updater.accelerator.device.type != "cuda":
        return "" if config.hardware.graphs is not True else "no CUDA graphs: this is not a GPU"
    if not shapes or updater.buffers is None:
        return "no CUDA graphs: they need packed rows, layers that are not sharded, and gradients that are kept"
    if fit.choice.checkpointing:
        return "no CUDA graphs: recomputation of activations sets random states, which a graph cannot"
    rows = updater.model.shared.weight.shape[0]
    parameters = [parameter for parameter in updater.model.parameters() if parameter.requires_grad]
    begin_s = time.perf_counter()
    updater.graphs, why_not = capture(
        updater.run_pass, shapes, rows, parameters, updater.buffers.begin_update, lambda: seed_dropout(updater.seed, 0, 0)
    )
    torch.cuda.empty_cache()
    missing = fit.missing_beside_graphs(torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved())
    if updater.graphs is not None and missing > 0:
        updater.graphs, why_not = None, f"optimizer and evaluation would lack {missing / GIB:.2f} GiB"
        torch.cuda.empty_cache()
    if updater.graphs is None:
        return f"no CUDA graphs, passes run eagerly: {why_not}"
    return f"CUDA graphs of {len(shapes)} shapes captured and compared in {time.perf_counter() - begin_s:.1f} s"


def make_plan_and_rules(config: Config, batches: Batches) -> tuple[Plan, Rules]:
    """Convert the plan and the stopping rules to updates."""
    plan = make_plan(config.schedule, config.evaluation, batches.updates_per_epoch, batches.mean_target_tokens)
    return plan, Rules.from_config(config.convergence, plan.to_updates, config.evaluation)


Fitted = tuple[Fit, T5Model, dict[str, int], Batches]
"""Memory plan, model, micro-batch sizes, batches."""


def resolve_device_and_memory(
    config: Config, corpus: Dataset, group: ProcessGroup
) -> tuple[torch.device, Precision, Accelerator, Fitted]:
    """Choose device and precision, and build for them; fall back to float32 if the precision fails on the first batches."""
    device, precision, accelerator = build_device(config)
    parts = build_for_plan(config, corpus, device, precision, group)
    _, model, _, batches = parts
    settled = settle_precision(config, model, batches, precision, device)
    if settled.name != precision.name:
        accelerator = build_accelerator(settled, device)
        parts = build_for_plan(config, corpus, device, settled, group)
    return device, settled, accelerator, parts


def build_for_plan(
    config: Config, corpus: Dataset, device: torch.device, precision: Precision, group: ProcessGroup = SINGLE_PROCESS
) -> Fitted:
    """Plan the memory, then build model and batches for the plan."""
    fit, sizes, batches = plan_batches(config, corpus, device, precision, group)
    model = build_trained_model(config, corpus, device, precision, checkpointing=fit.choice.checkpointing)
    # Gradients of sharded layers are reduced by hooks of autograd.
    install_lean_layers(model, in_place=fit.processes == 1, by_kernel=runs_static_shapes(device, batches))
    return fit, model, sizes, batches


def plan_batches(
    config: Config, corpus: Dataset, device: torch.device, precision: Precision, group: ProcessGroup = SINGLE_PROCESS
) -> tuple[Fit, dict[str, int], Batches]:
    """Plan the memory; return the plan, the micro-batch sizes and the batches."""
    sizes, task = batch_sizes(config, device), task_of(config, corpus.store)
    packing = packing_of(config, device, corpus, task, group.count)
    batches = Batches(corpus.train, corpus.table, config, seed=config.run.seed, packing=packing, **sizes)
    fit = fit_run(config, corpus.store, device, precision.name, group, largest_shape=batches.largest_shape if packing else None)
    batches.micro_tokens = sizes["micro_tokens"] = fit.choice.micro_tokens
    return fit, sizes, batches


def packing_of(config: Config, device: torch.device, corpus: Dataset, task: Task, processes: int = 1) -> Packing | None:
    """How updates are packed under `batch.pack`; None for one example a row.

    Never packed with adafactor_in_backward: it needs one micro-batch of whatever shape, and a packed update may need two.
    """
    wanted = device.type == "cuda" if config.batch.pack == "auto" else config.batch.pack
    if not wanted or config.optim.name == "adafactor_in_backward":
        return None
    gaps, source = corpus.table.gap_encoding, task.source_tokens
    if gaps is not None and gaps.starts_word.any():
        source = config.data.max_source_tokens  # the rest of a word after a gap may be divided into more pieces
    return Packing((source, task.target_tokens), processes)


def build_trained_model(
    config: Config, corpus: Dataset, device: torch.device, precision: Precision, *, checkpointing: bool
) -> T5Model:
    """Build the model with its trained vocabulary rows, float32, on the device, in training mode."""
    model = build_full_model(config, corpus.store)
    if config.model.active_vocabulary == "corpus":
        cut_vocabulary(model, corpus.active_to_full)
    return prepare_for_training(model, device, precision, checkpointing=checkpointing)


def prepare_for_training(model: T5Model, device: torch.device, precision: Precision, *, checkpointing: bool) -> T5Model:
    """Move the model to the device in training mode, with lean layers, and adapt it to checkpointing and precision."""
    install_lean_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        if device.type == "cpu":
            return_freed_memory_to_os()  # else the heap keeps the memory that checkpointing saves
    if precision.name == "fp16":
        install_float32_islands(model)
    model.to(device)  # type: ignore[arg-type]  # transformers types this method for pipelines only
    model.train()
    return model


def trained_ids(corpus: Dataset, model: T5Model) -> np.ndarray:
    """Return the full token ids of the model's rows; a full checkpoint may have more rows than tokens."""
    rows = model.shared.weight.shape[0]
    return corpus.active_to_full if rows == len(corpus.active_to_full) else np.arange(rows)


def build_full_model(config: Config, store: Store) -> T5Model:
    """Load the checkpoint, or build the model from scratch, with the full vocabulary."""
    tokenizer = store.tokenizer
    if config.model.name_or_path is not None:
        model = load_model(config.model.name_or_path, config.model)
        check_tokenizer_fits(tokenizer, model, config.model.name_or_path)
        return model
    special = SpecialIds(tokenizer.pad_id, tokenizer.eos_id, decoder_start_id=tokenizer.pad_id)
    return build_model(config.model, vocabulary_rows=tokenizer.size, special=special, seed=config.run.seed)


def original_tables(config: Config, store: Store) -> FullTables:
    """Return the vocabulary tables before training; an export copies the untrained rows from them."""
    if config.model.name_or_path is not None:
        return tables_from(config.model.name_or_path)
    return tables_of(build_full_model(config, store))


def batch_sizes(config: Config, device: torch.device) -> dict[str, int]:
    """Return micro-batch budget and padding in tokens; `auto` becomes the default of the device."""
    micro, multiple = config.batch.micro_tokens, config.batch.pad_multiple
    return {
        "micro_tokens": MICRO_TOKENS[device.type] if micro == "auto" else int(micro),
        "pad_multiple": PAD_MULTIPLE[device.type] if multiple == "auto" else multiple,
    }


def build_evaluator(
    config: Config, corpus: Dataset, accelerator: Accelerator, sharded: ShardedModel, sizes: dict[str, int]
) -> Evaluator:
    """Build the evaluator with its fixed examples, sorted by length."""

    def fixed(examples: int) -> list[EvaluationBatch]:
        return evaluation_batches(corpus.validation, corpus.table, config, examples=examples, seed=config.run.seed, **sizes)

    settings, restorer = config.evaluation, build_restorer(config, corpus, config.telemetry.samples)
    batches, restore_batches = fixed(settings.examples), fixed(settings.restore_examples)
    return Evaluator(accelerator, sharded, batches, restore_batches, restorer, settings.restore_every, sharded.ranks)


def build_restorer(config: Config, corpus: Dataset, samples: int) -> Restorer:
    """Collect what a restoration measurement over the validation split needs; it reports `samples` restored examples."""
    counts = count_terms(corpus.train.terms, len(corpus.store.terms))
    return Restorer(
        split=corpus.validation,
        table=corpus.table,
        glossary=Glossary(corpus.store.terms, counts, corpus.decode),
        majority=MajorityBaseline.fit(corpus.train),
        task=config.corruption.task,
        max_target_tokens=config.data.max_target_tokens,
        samples=samples,
    )
