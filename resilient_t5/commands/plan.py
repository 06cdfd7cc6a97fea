"""bin/plan: estimate the memory of a run by item, list what fits, and print the table of all mT5 sizes."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import Arguments, parse_arguments
from resilient_t5.config.schema import Config, optimizer_problems
from resilient_t5.errors import ConfigError, ExitCode

DESCRIPTION = "Estimate whether a run fits into memory, and list the alternatives. Nothing is allocated, downloaded or written."
FLAGS = (
    ("--format", {"type": str, "default": "text", "help": "text (default) or json (one object)"}),
    ("--table", {"type": str, "default": None, "help": "mt5: Markdown table of all mT5 sizes at 4 to 24 GiB"}),
    (
        "--processes",
        {"type": int, "default": 1, "help": "GPUs that share the layers (with --hardware.shard_layers true)"},
    ),
    (
        "--rows",
        {
            "type": int,
            "default": None,
            "help": "trained vocabulary rows (default: those of the store, else 32768 or all)",
        },
    ),
)
TABLE_SIZES = ("mt5-small", "mt5-base", "mt5-large", "mt5-xl")
TABLE_GIB = (4, 6, 8, 12, 16, 24)
ACTIVE_ROWS = 32_768
"""Rows that a corpus typically uses of mT5's 250,112, rounded up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/plan` and return its exit code."""
    return reported(lambda: _plan(sys.argv[1:] if argv is None else argv))


def _plan(argv: Sequence[str]) -> ExitCode:
    arguments = parse_arguments(argv, "plan", DESCRIPTION, FLAGS)
    if arguments.flags["format"] not in ("text", "json") or arguments.flags["table"] not in (None, "mt5"):
        raise ConfigError("--format is text or json, --table is mt5")
    if arguments.flags["table"] is not None:
        sys.stdout.write("\n".join(_table(arguments)) + "\n")
        return ExitCode.OK
    as_json = arguments.flags["format"] == "json"
    text = json.dumps(_plan_values(arguments), indent=1) if as_json else "\n".join(plan_lines(arguments))
    sys.stdout.write(text + "\n")
    return ExitCode.OK


def plan_lines(arguments: Arguments) -> Iterator[str]:
    """The text that bin/plan prints for `arguments`."""
    return _text(_plan_values(arguments))


def _plan_values(arguments: Arguments) -> dict[str, Any]:
    """The plan as JSON values."""
    # Imported late: torch takes seconds to import; --help and a usage error do not need it.
    from resilient_t5.data.tokenizer.sentencepiece import SENTINELS
    from resilient_t5.model.memory import GIB, OPTIMIZERS, choices, first_fit, smallest_card_gib
    from resilient_t5.model.shapes import sizes_of_settings
    from resilient_t5.training.hardware.memory_fit import fit

    config = arguments.config
    if config.model.name_or_path is None and config.model.preset is None:
        raise ConfigError("no model: set model.name_or_path (a checkpoint) or model.preset (a shape)")
    if problems := optimizer_problems(config):
        raise ConfigError(*problems)
    processes = int(arguments.flags.get("processes", 1))
    if processes < 1 or (processes > 1 and not config.hardware.shard_layers):
        raise ConfigError(f"--processes {processes}: must be at least 1, and more than 1 needs --hardware.shard_layers true")
    store, task = _store_and_task(config)
    pieces = config.tokenizer.train_vocab_size if config.model.name_or_path is None else None
    whole = sizes_of_settings(config.model, None if pieces is None else pieces + SENTINELS)
    _check_tokenizer(config, whole.rows)
    if config.model.active_vocabulary == "full":
        rows = whole.rows
    else:
        rows = min(whole.rows, ACTIVE_ROWS) if store is None else len(store.active_to_full)
    rows = arguments.flags.get("rows") or rows
    sizes = whole.with_rows(rows)
    memory, precision = _memory_and_precision(config)
    own = fit(config, sizes, task, memory, precision, processes)
    optimizers = OPTIMIZERS if own.processes == 1 else ("adamw",)
    listed = list(choices(sizes, task, memory, precision, optimizers, own.processes))
    chosen = first_fit(listed)
    return {
        "parameters": sizes.parameters,
        "parameters_full_vocabulary": whole.parameters,
        "rows": rows,
        "full_rows": whole.rows,
        "source_tokens": task.source_tokens,
        "target_tokens": task.target_tokens,
        "examples_per_update": task.examples_per_update,
        "processes": own.processes,
        "memory_gib": memory.total / GIB,
        "usable_gib": memory.usable / GIB,
        "on_gpu": memory.on_gpu,
        "precision": precision,
        "choices": [choice.to_json() for choice in listed],
        "chosen": None if chosen is None else chosen.to_json(),
        "as_configured": {**own.choice.to_json(), "why": own.why},
        "smallest_card_gib": {name: smallest_card_gib(sizes, task, precision, (name,), own.processes) for name in optimizers},
    }


def _check_tokenizer(config: Config, rows: int) -> None:
    """Raise the error that training would raise for the tokenizer of a local model, if it has one."""
    from resilient_t5 import hub
    from resilient_t5.data.tokenizer.tokenizer import check_rows, load_tokenizer

    name = config.tokenizer.name_or_path or config.model.name_or_path
    directory = None if config.model.name_or_path is None or name is None else hub.cached(name, "tokenizer")
    if directory is None or not any((directory / file).is_file() for file in hub.TOKENIZER_FILES):
        return
    assert name is not None and config.model.name_or_path is not None
    setting = "tokenizer.name_or_path" if config.tokenizer.name_or_path else "model.name_or_path"
    check_rows(load_tokenizer(name, setting=setting), rows, config.model.name_or_path)


def _store_and_task(config: Config) -> tuple[Any, Any]:
    """The prepared corpus or None, and its longest example or the longest one that the settings allow."""
    from resilient_t5.data.store.prepare import store_directory
    from resilient_t5.data.store.store import Store, store_state
    from resilient_t5.model.memory import Task
    from resilient_t5.training.hardware.memory_fit import task_of

    directory = store_directory(config)
    if store_state(directory) == "store":
        store = Store.open(directory)
        return store, task_of(config, store)
    return None, Task(config.data.max_source_tokens, config.data.max_target_tokens, config.batch.examples_per_update)


def _memory_and_precision(config: Any) -> tuple[Any, Any]:
    """Memory and precision to plan for: this machine's device, or a hypothetical GPU of `hardware.memory_gib`."""
    import torch

    from resilient_t5.model.memory import GIB, Memory
    from resilient_t5.model.precision import choose_precision
    from resilient_t5.training.hardware.machine import choose_device
    from resilient_t5.training.hardware.memory_fit import memory_of

    memory_gib, name = config.hardware.memory_gib, config.hardware.device
    if not torch.cuda.is_available():
        if memory_gib != "auto" and name != "cpu":
            precision = "bf16" if config.hardware.precision == "auto" else config.hardware.precision
            return Memory(float(memory_gib) * GIB), precision
        if name == "cuda":
            raise ConfigError("hardware.device: this machine has no GPU; give the memory of the GPU with --hardware.memory_gib")
    device = choose_device(name)
    return memory_of(config, device), choose_precision(config.hardware.precision, device).name


def _text(plan: dict[str, Any]) -> Iterator[str]:
    kind = "GPU" if plan["on_gpu"] else "CPU"
    yield (
        f"model  {plan['parameters'] / 1e6:.1f} M parameters over {plan['rows']} vocabulary rows"
        f" ({plan['parameters_full_vocabulary'] / 1e6:.1f} M over all {plan['full_rows']})"
    )
    yield (
        f"task   examples of up to {plan['source_tokens']} + {plan['target_tokens']} tokens,"
        f" {plan['examples_per_update']} per update"
    )
    yield (
        f"memory {plan['memory_gib']:.2f} GiB on a {kind}, {plan['usable_gib']:.2f} GiB of it usable; weights in float32,"
        f" matrix products in {plan['precision']}"
    )
    if plan["processes"] > 1:
        yield f"GPUs   {plan['processes']} share the layers; replicated: vocabulary tables, and during evaluation all weights"
    yield ""
    yield f"{'optimizer':22} {'recompute':9} {'tokens':>6} {'cost':>5} {'GiB':>7}  weights gradients  states activations  work"
    for choice in plan["choices"]:
        yield _line(choice)
    yield ""
    chosen = plan["chosen"]
    if chosen is None:
        yield "nothing fits"
    else:
        checkpointing = "true" if chosen["checkpointing"] else "false"
        yield (
            f"choice --optim.name {chosen['optimizer']} --model.gradient_checkpointing {checkpointing}"
            f" --batch.micro_tokens {chosen['micro_tokens']}: the most exact option that fits, {chosen['needed_gib']:.2f} GiB"
        )
    own = plan["as_configured"]
    verdict = "fits" if own["fits"] else "does not fit"
    yield f"config {own['optimizer']}, {own['micro_tokens']} tokens: {verdict}, {own['why']}"
    cards = ", ".join(f"{name} {gib:.1f}" for name, gib in plan["smallest_card_gib"].items())
    yield f"smallest card in GiB, with one example per micro-batch: {cards}"


def _line(choice: dict[str, Any]) -> str:
    recompute = "layers" if choice["checkpointing"] else "-"
    return (
        f"{choice['optimizer']:22} {recompute:9} {choice['micro_tokens']:>6} {choice['cost']:5.2f} {choice['needed_gib']:7.2f}"
        f" {choice['weights_gib']:8.2f} {choice['gradients_gib']:9.2f} {choice['optimizer_gib']:7.2f}"
        f" {choice['activations_gib']:11.2f} {choice['workspace_gib']:5.2f}  {'fits' if choice['fits'] else 'too large'}"
    )


def _table(arguments: Arguments) -> Iterator[str]:
    """Markdown table of the most exact option that fits, for every mT5 size and card."""
    from resilient_t5.model.load import PRESETS
    from resilient_t5.model.memory import GIB, OPTIMIZERS, Memory, Task, choices, first_fit
    from resilient_t5.model.shapes import MT5_ROWS, sizes_of_shape

    config = arguments.config
    task = Task(config.data.max_source_tokens, config.data.max_target_tokens, config.batch.examples_per_update)
    precision: Any = "bf16" if config.hardware.precision == "auto" else config.hardware.precision
    yield f"| model, rows | {' | '.join(f'{gib} GiB' for gib in TABLE_GIB)} |"
    yield f"| --- |{' --- |' * len(TABLE_GIB)}"
    for name in TABLE_SIZES:
        for rows in (arguments.flags["rows"] or ACTIVE_ROWS, MT5_ROWS):
            cells = []
            for gib in TABLE_GIB:
                sizes = sizes_of_shape(PRESETS[name], rows)
                choice = first_fit(list(choices(sizes, task, Memory(gib * GIB), precision, OPTIMIZERS)))
                cells.append(
                    "-"
                    if choice is None
                    else f"{choice.optimizer}{', checkpointing' if choice.checkpointing else ''}, {choice.micro_tokens}"
                    f" ({choice.needed / GIB:.2f})"
                )
            yield f"| {name}, {rows:,} | {' | '.join(cells)} |"
