"""A run whose loss has a plateau and then a second descent: where the peer's rule and ours stop, and what each model restores.

A note names a disease, an age, a kidney function and a drug, three words each, in any order. An invented formulary
determines the drug from the other three together; any two of them carry no information about it. A model first learns that
a drug is missing, stays at the loss of a guess among three (ln 3 over the three tokens of a target: 0.366), and learns the
formulary later or never. The plateau is a property of the task; loss and order of the notes are not modified.

For each seed, `configs/second-descent.yaml` trains unchanged, and again under `seed-code`, the peer's rule, scaled to the
length of the run as 6000 and 1000 are to the peer's 60,000 updates. That rule is also replayed over the first run, which
must stop at the same update with the same best. `bin/evaluate` then tests both models on the same held-out notes.

    python benchmarks/second_descent.py [--seeds 42 43 44] [--dir runs/second-descent-benchmark] [--json FILE]
    python benchmarks/second_descent.py --notes_only         only writes the notes that the configuration names

The last line is JSON: {"seeds": {seed: {"seed_code": {...}, "ours": {...}, "replay_agrees": true}}}.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from circumstances import circumstances

from resilient_t5.config.sections import ConvergenceConfig
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import ReplayComparison, replay, replay_rules
from resilient_t5.training.telemetry.plots import draw_replay

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "second-descent.yaml"
NOTES_DIRECTORY = Path("runs/second-descent-notes")
NOTES = 20_000
"""Duplicates count once, which leaves 930 updates of 16 per epoch."""
PEER_STARTS_AT = 180
"""The peer's 6000 of 60,000 updates; the configuration evaluates every 30, its 1000."""
FACTS = {
    "disease": ("pneumonia", "cystitis", "cellulitis"),
    "age": ("infant", "pensioner", "teenager"),
    "kidneys": ("normal", "failing", "reduced"),
    "drug": ("amoxicillin", "cefuroxime", "doxycycline"),
}
# Several marks after each word: SentencePiece makes a piece only of what has more than one continuation.
AFTER_FACT = (".", ";", "!")


def notes(count: int, seed: int) -> list[str]:
    """Notes of four words in any order; the drug is the sum of the other three, modulo their number."""
    draw, texts = random.Random(seed), []
    size = len(FACTS["drug"])
    for _ in range(count):
        chosen = [draw.randrange(size) for _ in range(3)]
        chosen.append(sum(chosen) % size)
        words = [words[index] + draw.choice(AFTER_FACT) for words, index in zip(FACTS.values(), chosen, strict=True)]
        draw.shuffle(words)
        texts.append(" ".join(words))
    return texts


def write_notes(directory: Path) -> tuple[Path, Path]:
    """Write the notes and the term list, which has only the drugs."""
    directory.mkdir(parents=True, exist_ok=True)
    text, terms = directory / "notes.txt", directory / "terms.txt"
    text.write_text("\n\n".join(notes(NOTES, seed=1)) + "\n", encoding="utf-8")
    terms.write_text("\n".join(FACTS["drug"]) + "\n", encoding="utf-8")
    return text, terms


def train(run: Path, *arguments: str) -> dict[str, object]:
    """Run bin/train to its end and return its summary."""
    command = [sys.executable, str(ROOT / "bin" / "train"), "--config", str(CONFIG), "--run.dir", str(run), *arguments]
    with (run.parent / f"{run.name}.log").open("a", encoding="utf-8") as console:
        subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, check=True)
    summary: dict[str, object] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return summary


def compare(directory: Path, seed: int, inputs: list[str]) -> dict[str, object]:
    """Train one seed under each rule, and replay the peer's rule over our run."""
    names = {side: directory / f"{side}-{seed}" for side in ("ours", "seed-code")}
    common = [*inputs, "--run.seed", str(seed)]
    peer = ConvergenceConfig(preset="seed-code", start=PEER_STARTS_AT, judge_from=PEER_STARTS_AT)
    scaled = ["--convergence.preset", peer.preset]
    scaled += ["--convergence.start", str(PEER_STARTS_AT), "--convergence.judge_from", str(PEER_STARTS_AT)]
    ours = train(names["ours"], *common)
    theirs = train(names["seed-code"], *common, *scaled)
    (curve,) = read_curves(names["ours"])
    assert curve.rules is not None
    replayed = replay(curve, replay_rules(curve, peer))
    draw_replay(replay(curve, curve.rules), directory / f"second-descent-{seed}.png", ReplayComparison(peer.preset, replayed))
    stopped = replayed.verdicts[-1].update if replayed.stopped else None
    agrees = stopped == (theirs["updates"] if theirs["status"] == "saturated" else None)
    agrees = agrees and replayed.best is not None and theirs["best"]["loss"] == replayed.best.loss  # type: ignore[index]
    rates = restoration(list(names.values()))
    sides = {side: {**_figures(summary), **rates[side]} for side, summary in (("ours", ours), ("seed-code", theirs))}
    return {"seed_code": sides["seed-code"], "ours": sides["ours"], "replayed_stop": stopped, "replay_agrees": agrees}


def restoration(runs: list[Path]) -> dict[str, dict[str, float]]:
    """Restoration of each run's best model on its held-out notes, from bin/evaluate."""
    command = [sys.executable, str(ROOT / "bin" / "evaluate"), *map(str, runs), "--curve_examples", "0", "--png", ""]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    models = json.loads(done.stdout.splitlines()[-1])["models"]
    kept = ("term_rate", "term_rate_low", "term_rate_high", "n", "majority_rate")
    return {run.name.rsplit("-", 1)[0]: {key: model[key] for key in kept} for run, model in zip(runs, models, strict=True)}


def _figures(summary: dict[str, object]) -> dict[str, object]:
    return {key: summary[key] for key in ("stop_reason", "updates", "best", "wall_s")}


def main() -> int:
    """Run all seeds; print a line for each, then JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--dir", type=Path, default=Path("runs/second-descent-benchmark"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="also write the last line there")
    parser.add_argument("--notes_only", action="store_true", help="only write the notes that the configuration names")
    arguments = parser.parse_args()
    if arguments.notes_only:
        print(*write_notes(NOTES_DIRECTORY))
        return 0
    text, terms = write_notes(arguments.dir / "notes")
    inputs = ["--data.train", str(text), "--data.terms", str(terms)]
    seeds = {}
    for seed in arguments.seeds:
        seeds[str(seed)] = result_of_seed = compare(arguments.dir, seed, inputs)
        print(f"seed {seed}: {json.dumps(result_of_seed)}", flush=True)
    result = {**circumstances("second_descent", ("torch", "transformers", "accelerate")), "seeds": seeds}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
