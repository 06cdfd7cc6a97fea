"""Gaps filled per second, compared with `generate` of transformers on the same model and gaps.

    python benchmarks/restore.py [MODEL] [--notes 200] [--rounds 5] [--beams 1] [--json FILE]

MODEL is an export or a run. The default is a T5 with random weights (width 256, 4 layers) and a tokenizer trained on the
notes; its answers run to the limit of 24 tokens. The texts are clinical notes, unsorted, with one term removed from each.
Three variants run interleaved in one process on one thread; results are medians over the rounds of processor time:
  ours            the filler as in bin/restore: windows, batches by length, constrained search, probabilities
  plain           generate of transformers, batches of 16 in the order of the texts, as in its examples
  sorted          the same, sorted by length and in the same batches as ours: a tuned script
The last two are unconstrained and may leave gaps without an answer; that share is reported.
The last line is JSON: {"ours_gaps_per_s", "plain_gaps_per_s", "sorted_gaps_per_s", "ratio_over_plain", ...}.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from circumstances import circumstances  # noqa: E402
from transformers import AutoModelForSeq2SeqLM  # noqa: E402

from resilient_t5.config.sections import ModelConfig  # noqa: E402
from resilient_t5.data.corpus.sample import generate_notes  # noqa: E402
from resilient_t5.data.tokenizer.tokenizer import train_tokenizer  # noqa: E402
from resilient_t5.model.load import SpecialIds, build_model, save_model  # noqa: E402
from resilient_t5.restoration.beam_search import DecodeSettings  # noqa: E402
from resilient_t5.restoration.filler import local_directory, open_filler  # noqa: E402
from resilient_t5.restoration.gaps import OpenDocument, encode_documents, find_gaps, make_windows  # noqa: E402
from resilient_t5.restoration.restoration_config import RestorationConfig  # noqa: E402
from resilient_t5.restoration.sentinels import parse_output  # noqa: E402

PLAIN_BATCH = 16
SIZES = {"d_model": 256, "d_ff": 512, "num_layers": 4, "num_heads": 4}


def random_export(folder):
    """Write an export of a model with random weights."""
    tokenizer = train_tokenizer([note.text for note in generate_notes(2000, 5)], 4000, 0.9995)
    special = SpecialIds(tokenizer.pad_id, tokenizer.eos_id, tokenizer.pad_id)
    settings = ModelConfig(preset="tiny", **SIZES)
    model = build_model(settings, vocabulary_rows=tokenizer.size, special=special, seed=1)
    save_model(model, folder)
    tokenizer.save(folder)
    RestorationConfig(max_source_tokens=128, max_target_tokens=24, max_sentinels=5, document="line").write(folder)
    return folder


def texts_with_gaps(count):
    """Notes with one term removed, in rotation, and their gaps."""
    found = []
    for number, note in enumerate(generate_notes(count, 77)):
        term = note.facts[number % len(note.facts)]
        text = note.text.replace(term, "[?]", 1)
        found.append((text, find_gaps(text, ["[?]"])))
    return found


def library_side(model, filler, texts, batches, beams):
    """Fill by `generate` in the given batches; return the number of gaps without an answer."""
    tokenizer = filler.tokenizer
    documents = [OpenDocument.of(text, [(gap.start, gap.end) for gap in gaps], i) for i, (text, gaps) in enumerate(texts)]
    limits = (filler.config.max_source_tokens, filler.max_gaps)
    encoded = encode_documents(documents, tokenizer)
    sources = [make_windows(document, tokenizer, *limits)[0].source for document in encoded]
    missing = 0
    for batch in batches(sources):
        longest = max(len(sources[i]) for i in batch)
        ids = torch.tensor([[*sources[i].tolist(), *[tokenizer.pad_id] * (longest - len(sources[i]))] for i in batch])
        written = model.generate(
            ids, attention_mask=(ids != tokenizer.pad_id).long(), max_new_tokens=filler.config.max_target_tokens,
            num_beams=beams, do_sample=False,
        )  # fmt: skip
        for row in written[:, 1:].numpy():
            output = parse_output(row, tokenizer.sentinel_ids, tokenizer.eos_id, tokenizer.pad_id, 1)
            missing += output.spans[0] is None or len(output.spans[0]) == 0
            tokenizer.decode([] if output.spans[0] is None else output.spans[0].tolist())
    return missing


def in_order(sources):
    """Batches in the order of the texts."""
    return [list(range(i, min(i + PLAIN_BATCH, len(sources)))) for i in range(0, len(sources), PLAIN_BATCH)]


def by_length(sources):
    """Batches of similar length, as large as ours."""
    order, size = sorted(range(len(sources)), key=lambda i: len(sources[i])), 64
    return [order[i : i + size] for i in range(0, len(order), size)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--notes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        directory = random_export(Path(folder)) if arguments.model is None else local_directory(arguments.model)
        filler, _ = open_filler(str(directory))
        model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    texts = texts_with_gaps(arguments.notes)
    settings = DecodeSettings(beams=arguments.beams)
    sides = {
        "ours": lambda: filler.fill(texts, settings) and 0,
        "plain": lambda: library_side(model, filler, texts, in_order, arguments.beams),
        "sorted": lambda: library_side(model, filler, texts, by_length, arguments.beams),
    }
    core_s, wall_s, missing = {name: [] for name in sides}, {name: [] for name in sides}, {}
    for number in range(arguments.rounds + 1):
        for name, side in sides.items():
            begin_s, begin_wall_s = time.process_time(), time.perf_counter()
            missing[name] = side()
            if number > 0:  # the first round warms caches
                core_s[name].append(time.process_time() - begin_s)
                wall_s[name].append(time.perf_counter() - begin_wall_s)
    gaps = len(texts)
    report = {f"{name}_gaps_per_s": round(gaps / statistics.median(seconds), 1) for name, seconds in core_s.items()}
    report |= {f"{name}_gaps_per_wall_s": round(gaps / statistics.median(s), 1) for name, s in wall_s.items()}
    for name in ("plain", "sorted"):
        ratios = np.array(core_s[name]) / np.array(core_s["ours"])
        report[f"ratio_over_{name}"] = round(float(np.median(ratios)), 2)
        report[f"ratio_over_{name}_range"] = [round(float(ratios.min()), 2), round(float(ratios.max()), 2)]
        report[f"{name}_unanswered_share"] = round(missing[name] / gaps, 4)
    report |= {"gaps": gaps, "beams": arguments.beams, "rounds": arguments.rounds}
    report |= {"model": Path(arguments.model).name if arguments.model else "random"}
    for name in sides:
        print(f"{name:>7}: {report[f'{name}_gaps_per_s']:>8} gaps per second of processor time")
    report = circumstances("restore", ("resilient_t5", "torch", "transformers", "numpy")) | report
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
