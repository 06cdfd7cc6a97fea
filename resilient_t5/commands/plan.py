"""bin/plan: what fits into a card, by item, before anything is allocated; and the table of all mT5 sizes."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import Arguments, parse_arguments
from resilient_t5.config.schema import Config, optimizer_problems
from resilient_t5.errors import ConfigError, ExitCode

DESCRIPTION = "Say what fits into a card, and what would: nothing is allocated, nothing is fetched, nothing is written."
FLAGS = (
    ("--format", {"type": str, "default": "text", "help": "text, or json: one object"}),
    ("--table", {"type": str, "default": None, "help": "mt5: every mT5 size at 4 to 24 GiB, as a Markdown table"}),
    ("--processes", {"type": int, "default": 1, "help": "cards that share the layers with --hardware.shard_layers true"}),
    ("--rows", {"type": int, "default": None, "help": "vocabulary rows; without it those of the store, else 32768 or all"}),
)
TABLE_SIZES = ("mt5-small", "mt5-base", "mt5-large", "mt5-xl")
TABLE_GIB = (4, 6, 8, 12, 16, 24)
ACTIVE_ROWS = 32_768
"""What a corpus typically uses of mT5's 250,112 rows, rounded up."""


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
    found = _found(arguments)
    if arguments.flags["format"] == "json":
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(_text(found)) + "\n")
    return ExitCode.OK


def plan_lines(arguments: Arguments) -> Iterator[str]:
    """The plan of `arguments` as bin/plan prints it."""
    return _text(_found(arguments))


def _found(arguments: Arguments) -> dict[str, Any]:
    """The plan as plain values."""
    # Imported late: --help and a typo must not wait for torch.
    from resilient_t5.model.memory import GIB, OPTIMIZERS, choices, first_fit, smallest_card_gib
    from resilient_t5.model.shapes import sizes_of_settings
    from resilient_t5.training.hardware.memory_fit import fit

    config = arguments.config
    if config.model.name_or_path is None and config.model.preset is None:
        raise ConfigError("no model: set model.name_or_path (a checkpoint) or model.preset (a shape)")
    if problems := optimizer_problems(config):
        raise ConfigError(*problems)
    store, task = _store_and_task(arguments)
    whole = sizes_of_settings(config.model, _trained_rows(config))
    _check_tokenizer(config, whole.rows)
    rows = arguments.flags.get("rows") or _rows(config, store, whole.rows)
    sizes = whole.with_rows(rows)
    memory, precision = _memory_and_precision(config)
    own = fit(config, sizes, task, memory, precision, _processes(arguments))
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
    """Refuse what training would refuse: the tokenizer of a model that is on this machine, where it has one."""
    from resilient_t5 import hub
    from resilient_t5.data.tokenizer.tokenizer import check_rows, load_tokenizer

    name = config.tokenizer.name_or_path or config.model.name_or_path
    directory = None if config.model.name_or_path is None or name is None else hub.cached(name, "tokenizer")
    if directory is None or not any((directory / file).is_file() for file in hub.TOKENIZER_FILES):
        return
    assert name is not None and config.model.name_or_path is not None
    setting = "tokenizer.name_or_path" if config.tokenizer.name_or_path else "model.name_or_path"
    check_rows(load_tokenizer(name, setting=setting), rows, config.model.name_or_path)


def _processes(arguments: Arguments) -> int:
    """Processes to plan for.

    Raises:
        ConfigError: several that share nothing, of which each needs what one does.
    """
    processes = int(arguments.flags.get("processes", 1))
    if processes < 1 or (processes > 1 and not arguments.config.hardware.shard_layers):
        raise ConfigError(f"--processes {processes}: needs 1 or more, and more than 1 need --hardware.shard_layers true")
    return processes


def _store_and_task(arguments: Arguments) -> tuple[Any, Any]:
    """The prepared corpus, where there is one, and the longest example of it, or of what the settings allow."""
    from resilient_t5.data.store.prepare import store_directory
    from resilient_t5.data.store.store import Store, store_state
    from resilient_t5.model.memory import Task
    from resilient_t5.training.hardware.memory_fit import task_of

    config, directory = arguments.config, store_directory(arguments.config)
    if store_state(directory) == "store":
        store = Store.open(directory)
        return store, task_of(config, store)
    return None, Task(config.data.max_source_tokens, config.data.max_target_tokens, config.batch.examples_per_update)


def _trained_rows(config: Any) -> int | None:
    """Rows of a model from scratch whose tokenizer is trained on the corpus: pieces and sentinels; None when not known."""
    from resilient_t5.data.tokenizer.tokenizer import SENTINELS

    pieces = config.tokenizer.train_vocab_size
    return None if pieces is None or config.model.name_or_path is not None else pieces + SENTINELS


def _rows(config: Any, store: Any, full: int) -> int:
    if config.model.active_vocabulary == "full":
        return full
    return len(store.active_to_full) if store is not None else min(full, ACTIVE_ROWS)


def _memory_and_precision(config: Any) -> tuple[Any, Any]:
    """What is planned for: this machine's device, or a GPU of `hardware.memory_gib` that need not be there."""
    import torch

    from resilient_t5.model.memory import GIB, Memory
    from resilient_t5.model.precision import choose_precision
    from resilient_t5.training.hardware.machine import choose_device
    from resilient_t5.training.hardware.memory_fit import memory_of

    asked, wanted = config.hardware.memory_gib, config.hardware.device
    device = choose_device(wanted) if wanted != "cuda" or torch.cuda.is_available() else torch.device("cuda")
    if asked != "auto" and wanted != "cpu" and not torch.cuda.is_available():
        precision = "bf16" if config.hardware.precision == "auto" else config.hardware.precision
        return Memory(float(asked) * GIB), precision
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("hardware.device: there is no GPU here; say how large the card is with --hardware.memory_gib")
    return memory_of(config, device), choose_precision(config.hardware.precision, device).name


def _text(found: dict[str, Any]) -> Iterator[str]:
    kind = "GPU" if found["on_gpu"] else "CPU"
    yield (
        f"model  {found['parameters'] / 1e6:.1f} M parameters over {found['rows']} vocabulary rows"
        f" ({found['parameters_full_vocabulary'] / 1e6:.1f} M over all {found['full_rows']})"
    )
    yield (
        f"task   examples of up to {found['source_tokens']} + {found['target_tokens']} tokens,"
        f" {found['examples_per_update']} an update"
    )
    yield (
        f"memory {found['memory_gib']:.2f} GiB on a {kind}, {found['usable_gib']:.2f} of it usable; weights in float32,"
        f" products in {found['precision']}"
    )
    if found["processes"] > 1:
        yield f"cards  {found['processes']} share the layers; whole on each: the tables, and in an evaluation all weights"
    yield ""
    yield f"{'optimizer':22} {'recompute':9} {'tokens':>6} {'cost':>5} {'GiB':>7}  weights gradients  states activations  work"
    for choice in found["choices"]:
        yield _line(choice)
    yield ""
    chosen = found["chosen"]
    if chosen is None:
        yield "nothing fits"
    else:
        checkpointing = "true" if chosen["checkpointing"] else "false"
        yield (
            f"choice --optim.name {chosen['optimizer']} --model.gradient_checkpointing {checkpointing}"
            f" --batch.micro_tokens {chosen['micro_tokens']}: the most exact that fits, {chosen['needed_gib']:.2f} GiB"
        )
    own = found["as_configured"]
    verdict = "fits" if own["fits"] else "does not fit"
    yield f"as set {own['optimizer']}, {own['micro_tokens']} tokens: {verdict}, {own['why']}"
    cards = ", ".join(f"{name} {gib:.1f}" for name, gib in found["smallest_card_gib"].items())
    yield f"smallest card in GiB, one longest example at a time: {cards}"


def _line(choice: dict[str, Any]) -> str:
    recompute = "layers" if choice["checkpointing"] else "-"
    return (
        f"{choice['optimizer']:22} {recompute:9} {choice['micro_tokens']:>6} {choice['cost']:5.2f} {choice['needed_gib']:7.2f}"
        f" {choice['weights_gib']:8.2f} {choice['gradients_gib']:9.2f} {choice['optimizer_gib']:7.2f}"
        f" {choice['activations_gib']:11.2f} {choice['workspace_gib']:5.2f}  {'fits' if choice['fits'] else 'too large'}"
    )


def _table(arguments: Arguments) -> Iterator[str]:
    """Every mT5 size at every card, in Markdown: the most exact way that fits."""
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
