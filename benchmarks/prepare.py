"""Speed of preparing a corpus, compared with the bare batch encode of the tokenizer on the same text; cost of terms; memory.

    python benchmarks/prepare.py [--text FILE] [--terms FILE] [--large FILE] [--rounds 3] [--json FILE]

A tokenizer is trained on the text once; its time is not included. Each round measures the bare tokenizer, preparing with terms
and preparing without terms; the result is the median, in wall-clock and in CPU seconds (for busy machines). All sides may use
every core. Peak memory is measured in a new process for each file; with `--rounds 0` only memory is measured.
The last line is JSON: {"ratio_to_bare", "terms_share", "peak_memory_mib", ...}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from circumstances import circumstances

SHARED = Path(os.environ.get("RESILIENT_T5_SHARED", Path(__file__).parents[2] / "shared")) / "data"
VOCABULARY = 16_000
BATCH_CHARACTERS = 100_000
PACKAGES = ("tokenizers", "sentencepiece", "ahocorasick_rs", "numpy")


def configuration(text, terms, tokenizer):
    """Configuration of a preparation."""
    from resilient_t5.config.schema import Config, DataConfig, TokenizerConfig

    return Config(data=DataConfig(train=str(text), terms=terms and str(terms)), tokenizer=TokenizerConfig(str(tokenizer)))


def prepared(text, terms, tokenizer):
    """Prepare into a temporary directory; seconds, CPU seconds and the report."""
    from resilient_t5.data.store.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), time.process_time()
        store = prepare(configuration(text, terms, tokenizer), Path(folder, "store"))
        return time.perf_counter() - started, time.process_time() - cpu, store.report


def documents(text):
    """Documents of a file as the preparation reads them."""
    from resilient_t5.data.corpus.documents import read_documents
    from resilient_t5.data.corpus.formats import CorpusCounts

    settings = configuration(text, None, "none").data
    return [document.text for document in read_documents([str(text)], settings, CorpusCounts())]


def bare_encode(tokenizer, texts):
    """Seconds and CPU seconds of the batch encode of all texts with offsets, in batches that fit into the cache."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    seconds, cpu, batch, characters = 0.0, 0.0, [], 0
    for number, text in enumerate(texts):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or number == len(texts) - 1:
            started, cpu_started = time.perf_counter(), time.process_time()
            backend.encode_batch(batch, add_special_tokens=False)
            seconds += time.perf_counter() - started
            cpu += time.process_time() - cpu_started
            batch, characters = [], 0
    return seconds, cpu


def peak_in_fresh_process(text, terms, tokenizer):
    """Report of a preparation in a new process."""
    command = [sys.executable, __file__, "--one", str(text), str(terms), str(tokenizer)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.splitlines()
    return json.loads(lines[-1])


def measure(options):
    """All figures."""
    from resilient_t5.data.tokenizer.tokenizer import train_tokenizer

    texts = documents(options.text)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder)
        train_tokenizer(texts, VOCABULARY, 0.9995).save(tokenizer)
        rounds = []
        for _ in range(options.rounds):
            sides = {
                "bare": bare_encode(tokenizer, texts),
                "with": prepared(options.text, options.terms, tokenizer)[:2],
                "without": prepared(options.text, None, tokenizer)[:2],
            }
            rounds.append(sides)
            print("   ".join(f"{name} {wall:6.2f} s, {cpu:6.2f} CPU-s" for name, (wall, cpu) in sides.items()), flush=True)
        del texts
        files = [path for path in (options.text, options.large) if path.is_file()]
        memory = {path.name: peak_in_fresh_process(path, options.terms, tokenizer) for path in files}
    figures = {
        "text": options.text.name,
        "megabytes": megabytes,
        "peak_memory_mib": {name: report["peak_memory_mib"] for name, report in memory.items()},
        "memory_runs_seconds": {name: report["seconds"] for name, report in memory.items()},
        "reports": {name: content(report) for name, report in memory.items()},
        "rounds": options.rounds,
    }
    return figures | speeds(rounds, megabytes) if rounds else figures


def content(report):
    """Figures of a report that describe the corpus, without the count of each term."""
    keys = ("bytes", "characters", "documents", "tokens", "tokens_per_character", "unknown_share", "examples")
    more = ("validation_examples", "truncated_share", "active_vocabulary", "updates_per_epoch", "scale")
    terms = {key: value for key, value in report["terms"].items() if key != "per_term"}
    return {key: report[key] for key in keys + more} | {"terms": terms}


def speeds(rounds, megabytes):
    """Medians over the rounds."""
    wall = {name: statistics.median(sides[name][0] for sides in rounds) for name in rounds[0]}
    cpu = {name: statistics.median(sides[name][1] for sides in rounds) for name in rounds[0]}
    return {
        "bare_megabytes_per_s": megabytes / wall["bare"],
        "megabytes_per_s": megabytes / wall["with"],
        "ratio_to_bare": statistics.median(sides["bare"][0] / sides["with"][0] for sides in rounds),
        "ratio_to_bare_without_terms": statistics.median(sides["bare"][0] / sides["without"][0] for sides in rounds),
        "terms_share": statistics.median(1 - sides["without"][0] / sides["with"][0] for sides in rounds),
        "cpu_ratio_to_bare": cpu["bare"] / cpu["with"],
        "terms_cpu_share": statistics.median(1 - sides["without"][1] / sides["with"][1] for sides in rounds),
        "rounds_wall_s_and_cpu_s": rounds,
    }


def main():
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=SHARED / "zh_medical_25mb_open.txt")
    parser.add_argument("--terms", type=Path, default=SHARED / "zh_terms.txt")
    parser.add_argument("--large", type=Path, default=SHARED / "zh_tcm_ancient.txt.xz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("TEXT", "TERMS", "TOKENIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(prepared(*options.one)[2], ensure_ascii=False))
        return
    if not options.text.is_file():
        parser.error(f"no text at {options.text}; name a file with --text")
    figures = circumstances("prepare", PACKAGES) | measure(options)
    for name, value in figures.items():
        print(f"{name:>28}  {value if not isinstance(value, float) else round(value, 3)}")
    line = json.dumps(figures, ensure_ascii=False)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
