"""Measure your own GPU within a time limit: speed, kernels and memory compared with a tuned Seq2SeqTrainer, and a resume.

    bin/benchmark card [--minutes 9] [--corpus FILE --terms FILE] [--memory-gib 6] [--sms 24] [--device auto] [--out DIR]
                       [--only STAGE,STAGE] [--compile-seconds 75] [--prepare-only] [--quick]

The stages run in this order, the most important first; each measurement is a new process with a time limit:

    ceilings           name of the card; measured matrix products, memory bandwidth, cost of a kernel launch
    mt5-small          16 short texts an update: ours, ours without CUDA graphs, the Trainer, the Trainer with torch_compile
    mt5-small-kernels  kernels of an update, how long the card is busy, peak memory compared with the plan
    mt5-base, mt5-base-kernels    the same with mT5-base
    long-texts         texts that fill 512 tokens, the best batch of each side, share of the measured matrix products
    memory-cap         mT5-base with float32 AdamW within --memory-gib
    small-card         mT5-small on --sms multiprocessors and within --memory-gib
    quickstart         wall time of configs/quickstart.yaml
    from-scratch       a T5 from scratch with large updates
    resume             a deterministic run that is killed and resumed, compared bit for bit; the price of it

The result is rewritten in DIR/card.json after every measurement, so an interruption keeps what was measured; --only runs
some stages again and keeps the others. The store and the models (3.5 GB) stay in DIR and are used again. Without --corpus the
built-in notes are used, which have a small vocabulary: their figures favour ours. On a CPU mT5-base runs only if it is named
with --only, and stages that limit a GPU are skipped. No setting of a card is changed.

The last line is JSON, the same as in DIR/card.json.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import resilient_t5  # noqa: E402
from benchmarks.circumstances import circumstances, write_json  # noqa: E402
from benchmarks.peers.results import shown_options  # noqa: E402

DEFAULT_OUT = Path(tempfile.gettempdir()) / "resilient-t5-card"
PREPARE_MINUTES = 30.0
PACKAGES = ("torch", "transformers", "accelerate", "numpy")


class Interrupted(BaseException):
    """A signal that ends the benchmark; the result so far is kept."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stage(NamedTuple):
    """A stage: its function, which gets the session and the name, and the largest share of the time on a GPU."""

    run: Callable[[Any, str], None]
    share: float
    cpu_share: float
    """The same on a CPU; 0: a CPU runs it only if it is named."""
    needs_s: float
    """With less time left it is skipped, except with --quick."""


def stages() -> dict[str, Stage]:
    """The stages in their order. Imported late: --help needs no torch."""
    from benchmarks.card_stages import kernels, small_card, speed, training

    return {
        "ceilings": Stage(record_ceilings, 0.1, 0.1, 5),
        "mt5-small": Stage(partial(speed.short_texts, model="mt5-small"), 0.32, 0.5, 20),
        "mt5-small-kernels": Stage(partial(kernels.kernels_and_memory, model="mt5-small"), 0.15, 0.3, 20),
        "mt5-base": Stage(partial(speed.short_texts, model="mt5-base"), 0.32, 0.0, 30),
        "mt5-base-kernels": Stage(partial(kernels.kernels_and_memory, model="mt5-base"), 0.15, 0.0, 20),
        "long-texts": Stage(speed.long_texts, 0.2, 0.3, 20),
        "memory-cap": Stage(small_card.memory_cap, 0.12, 0.1, 15),
        "small-card": Stage(small_card.small_card, 0.2, 0.1, 20),
        "quickstart": Stage(training.quickstart, 0.4, 0.5, 60),
        "from-scratch": Stage(training.from_scratch, 0.2, 0.2, 10),
        "resume": Stage(training.resume, 0.4, 0.4, 30),
    }


def record_ceilings(session: Any, stage: str) -> None:
    """Measure the limits of the device."""
    from benchmarks.card_stages.ceilings import measure_ceilings

    outcome = session.run(measure_ceilings, session.device, session.sizes.name == "quick")
    if not outcome.done:
        raise RuntimeError(outcome.reason)
    session.record(stage, outcome.value)
    session.say(f"  {outcome.value['device']}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole benchmark")
    parser.add_argument("--corpus", type=Path, help="text, one document per line; default: built-in notes")
    parser.add_argument("--terms", type=Path, help="terms, one per line")
    parser.add_argument("--memory-gib", type=float, default=6.0, help="memory of the smaller card that is played")
    parser.add_argument("--sms", type=int, default=24, help="multiprocessors of the smaller card that is played")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help=f"folder of the results and inputs; default {DEFAULT_OUT}"
    )
    parser.add_argument("--only", help="comma-separated stages to run; the others keep their earlier result")
    parser.add_argument("--compile-seconds", type=float, help="limit of the warm-up with torch_compile; 0 leaves it out")
    parser.add_argument("--prepare-only", action="store_true", help="only prepare the stores in the folder, not the models")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few updates, to test the script")
    options = parser.parse_args(argv)
    if options.minutes <= 0 or options.memory_gib <= 0 or options.sms < 1:
        parser.error("--minutes, --memory-gib and --sms must be above 0")
    if (options.corpus is None) != (options.terms is None):
        parser.error("--corpus and --terms belong together")
    for path in (options.corpus, options.terms):
        if path is not None and not path.is_file():
            parser.error(f"{path} is not a file")
    if options.out.resolve().is_relative_to(Path(resilient_t5.__file__).resolve().parent):
        parser.error(f"--out {options.out} is inside the package")
    return options


def open_session(options: argparse.Namespace, argv: Sequence[str]) -> Any:
    """Create the session, with the earlier result if some stages are to be added to it."""
    from benchmarks.card_stages.session import CPU, GPU, QUICK, Session
    from resilient_t5.training.hardware.machine import choose_device

    device = choose_device(options.device).type
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = max(options.minutes, PREPARE_MINUTES) if options.prepare_only else options.minutes
    end_s = time.monotonic() + 60 * minutes
    sizes = QUICK if options.quick else GPU if device == "cuda" else CPU
    if options.compile_seconds is not None:
        sizes = dataclasses.replace(sizes, compile_s=options.compile_seconds)
    result = circumstances("card", PACKAGES) | {
        "resilient_t5": resilient_t5.__version__,
        "sizes": sizes.name,
        "minutes": options.minutes,
        "command": " ".join(["bin/benchmark card", *shown_options(argv)]),
        "ended": "running",
        "stages": {},
    }
    named = tuple(filter(None, (options.only or "").split(",")))
    session = Session(
        folder=options.out.resolve(),
        device=device,
        sizes=sizes,
        corpus=options.corpus,
        terms=options.terms,
        memory_gib=options.memory_gib,
        multiprocessors=options.sms,
        end_s=end_s,
        stage_end_s=end_s,
        result=result,
        say=lambda line: print(line, flush=True),
        named=named,
        prepares_only=options.prepare_only,
    )
    if not options.prepare_only:
        result["device"] = name_of_device(session)
        keep_earlier(session)
    return session


def name_of_device(session: Any) -> str:
    """Name and memory of the device, read in a process of its own, so that this one uses no memory of a GPU."""
    from benchmarks.card_stages.ceilings import name_device

    outcome = session.run(name_device, session.device)
    return str(outcome.value if outcome.done else outcome.reason)


def keep_earlier(session: Any) -> None:
    """Continue the result in the folder if stages are named and it is of the same device; otherwise move it aside."""
    path = session.folder / "card.json"
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        earlier = {}
    same = all(earlier.get(key) == session.result[key] for key in ("device", "sizes", "versions", "resilient_t5", "cores"))
    if session.named and same:
        session.result["stages"] = {name: stage for name, stage in earlier["stages"].items() if name not in session.named}
        session.result |= {key: earlier[key] for key in ("texts", "models") if key in earlier}
        return
    path.replace(path.with_name("card.previous.json"))
    session.say(f"the earlier result is kept as {path.with_name('card.previous.json')}")


def run_stages(session: Any, all_stages: dict[str, Stage]) -> None:
    """Run the stages one after the other; a stage without time or with an error is recorded with its reason."""
    from benchmarks.card_stages.session import MIN_MEASUREMENT_S

    total_s = session.end_s - time.monotonic()
    for name, stage in all_stages.items():
        if session.named and name not in session.named:
            continue
        started_s = time.monotonic()
        share = 1.0 if session.named else stage.share if session.on_gpu else stage.cpu_share
        session.stage_end_s = started_s + share * total_s
        needs_s = MIN_MEASUREMENT_S if session.sizes.name == "quick" else stage.needs_s
        if not share:
            session.record(name, {"status": "skipped", "reason": f"takes long on a CPU; --only {name} runs it"})
        elif session.left_s < needs_s:
            reason = f"{max(0.0, session.left_s):.0f} s left, {needs_s:.0f} s needed; raise --minutes, or name it with --only"
            session.record(name, {"status": "skipped", "reason": reason})
        else:
            session.record(name, {"status": "running"})
            session.say(f"{name} ({max(0.0, session.end_s - started_s):.0f} s left)")
            session.record(name, run_stage(session, name, stage))
            session.record(name, {"wall_s": round(time.monotonic() - started_s, 1)})


def run_stage(session: Any, name: str, stage: Stage) -> dict[str, Any]:
    """Run one stage; return its status, and the reason if it did not end well."""
    from benchmarks.card_stages.small_card import NeedsGpu

    try:
        stage.run(session, name)
    except NeedsGpu as error:
        session.say(f"  skipped: {error}")
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # one stage must not end the others
        session.say(f"  failed: {error}")
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    return {"status": "done"}


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler."""
    raise Interrupted(number)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; print progress, a table and one line of JSON."""
    options = parse(argv)
    # A process that is killed at its limit leaves semaphores, which Python would report at the end.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    all_stages = stages()
    unknown = [name for name in (options.only or "").split(",") if name and name not in all_stages]
    if unknown:
        sys.stderr.write(f"bin/benchmark card: error: --only {','.join(unknown)}: the stages are {', '.join(all_stages)}\n")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    session, code = open_session(options, argv), 0
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(session.folder / "inductor"))
    try:
        if options.prepare_only:
            return prepare(session)
        run_stages(session, all_stages)
        session.result["ended"] = "complete"
    except Interrupted as interruption:
        session.result["ended"], code = f"interrupted by {interruption}", 128 + interruption.number
        mark_interrupted(session)
    session.save()
    conclude(session)
    return code


def mark_interrupted(session: Any) -> None:
    """End what is still running, and give the stage that ran a reason."""
    from benchmarks.card_stages.limited import kill_all

    kill_all()
    for stage in session.result["stages"].values():
        if stage.get("status") == "running":
            stage |= {"status": "interrupted", "reason": session.result["ended"]}


def prepare(session: Any) -> int:
    """Prepare both stores and name the folder."""
    from benchmarks.card_stages.inputs import long_store, short_store

    for kind, make in (("short", short_store), ("long", long_store)):
        session.say(f"{kind} texts: {make(session).store}, {json.dumps(session.result['texts'][kind])}")
    return 0


def conclude(session: Any) -> None:
    """Print the table and the JSON, and draw the picture."""
    from benchmarks.card_stages.report import draw, table

    print("\n".join(table(session.result)))
    draw(session.result, session.folder / "card.png")
    print(f"result: {session.folder / 'card.json'}, {session.folder / 'card.png'}; output of the measurements: {session.log}")
    write_json(session.result, None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
