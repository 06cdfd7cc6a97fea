"""bin/restore: fill the gaps of a text, or correct it, with a trained model; all other bytes stay unchanged."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilient_t5.commands.failure import reported
from resilient_t5.errors import DataError, ExitCode, ResilientError, StorageError

if TYPE_CHECKING:
    from resilient_t5.restoration.filler import Filler, Tally
    from resilient_t5.restoration.text_encoding import TextBytes

DESCRIPTION = """Fill the gaps of a text with a trained model, or correct the text if the model was trained for correction.

MODEL is an exported directory, a run directory (its best export is used), or hub:NAME for a model of the Hugging Face hub.
The text is read from FILE or standard input and written to standard output in its original encoding."""
EPILOG = (
    "exit codes: 0 done; 2 usage; 65 no gap in the text, no T5 model in MODEL, or a text with an unknown encoding; "
    "74 input/output; 130 interrupted"
)
MIN_PROBABILITY = 1e-12


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/restore` and return its exit code."""
    return reported(lambda: _restore(sys.argv[1:] if argv is None else argv))


def _restore(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    # Imported late: torch takes seconds to import; --help and a usage error do not need it.
    from resilient_t5.restoration.decode import DecodeSettings
    from resilient_t5.restoration.filler import Tally, open_filler
    from resilient_t5.restoration.gaps import DEFAULT_MARK, find_gaps
    from resilient_t5.restoration.text_encoding import TextBytes
    from resilient_t5.training.hardware.machine import choose_device

    output_path = None if arguments.output is None else _output_path(arguments.output)
    marks = arguments.mark or [DEFAULT_MARK]
    find_gaps("", marks)  # reject an invalid mark before the text is read
    name, raw = _read(arguments.file)
    try:
        text = TextBytes.read(raw, name, arguments.encoding)
    except ResilientError as error:
        raise _with_option_name(error) from None
    settings = DecodeSettings(arguments.beams, arguments.alternatives, arguments.batch_tokens, text.encoding)
    filler, has_usage = open_filler(
        arguments.model,
        device=choose_device(arguments.device),
        max_source_tokens=arguments.max_source_tokens,
        max_sentinels=arguments.max_sentinels,
        document=arguments.document,
    )
    if not has_usage:
        print("restoration.json is missing: assuming T5's 27 gaps, 512 source tokens and 256 target tokens", file=sys.stderr)
    tally = Tally()
    if filler.usage.task == "correct":
        rows, replacements = _correct(filler, text, settings, tally)
    else:
        rows, replacements = _fill(filler, text, marks, settings, tally)
    if arguments.json:
        _write(output_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    else:
        _write(output_path, text.replaced(replacements))
    _report(tally, len(rows), filler)
    return ExitCode.OK


def _with_option_name(error: ResilientError) -> ResilientError:
    """The same error with the option of this command instead of the corpus setting."""
    keywords = {"where": error.where, "hint": error.hint.replace("data.encoding", "--encoding")} if error.hint else {}
    return type(error)(*(str(part).replace("data.encoding", "--encoding") for part in error.args), **keywords)


def _fill(
    filler: "Filler", text: "TextBytes", marks: list[str], settings: Any, tally: "Tally"
) -> tuple[list[dict[str, Any]], list[tuple[int, int, str]]]:
    """JSON rows and replacements (start, end, text) of all gaps."""
    from resilient_t5.restoration.gaps import find_gaps, other_marks

    gaps = find_gaps(text.text, marks)
    if not gaps and text.text.strip("\ufeff"):
        others = other_marks(text.text, marks)
        hint = f"It contains {', '.join(others)}: use --mark '{others[0]}'" if others else "Give its mark with --mark"
        raise DataError(f"no gap: {' or '.join(marks)} does not occur in the text", where=text.name, hint=hint)
    fills = (filler.fill([(text.text, gaps)], settings, tally) or [[]])[0]
    rows = [
        {
            "gap": number,
            "offset": fill.gap.start,
            "line": line,
            "mark": fill.gap.mark,
            "fill": fill.text,
            "probability": _rounded(fill.probability),
            "alternatives": [{"fill": other, "probability": _rounded(value)} for other, value in fill.alternatives],
        }
        for (number, fill), line in zip(enumerate(fills), _lines(text.text, [f.gap.start for f in fills]), strict=True)
    ]
    return rows, [(fill.gap.start, fill.gap.end, fill.text) for fill in fills]


def _correct(
    filler: "Filler", text: "TextBytes", settings: Any, tally: "Tally"
) -> tuple[list[dict[str, Any]], list[tuple[int, int, str]]]:
    """JSON rows and replacements (start, end, text) of all edits."""
    from resilient_t5.restoration.correction import correct

    edits = correct(filler, text.text, settings, tally) or []
    rows = [
        {
            "edit": number,
            "offset": edit.start,
            "line": line,
            "before": edit.before,
            "after": edit.after,
            "probability": _rounded(edit.probability),
        }
        for (number, edit), line in zip(enumerate(edits), _lines(text.text, [e.start for e in edits]), strict=True)
    ]
    return rows, [(edit.start, edit.end, edit.after) for edit in edits]


def _lines(text: str, offsets: Sequence[int]) -> list[int]:
    """Line numbers, from 1, of ascending offsets."""
    lines, line, done = [], 1, 0
    for offset in offsets:
        line += text.count("\n", done, offset)
        done = offset
        lines.append(line)
    return lines


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}") if probability > MIN_PROBABILITY else 0.0


def _read(file: str) -> tuple[str, bytes]:
    if file == "-":
        return "standard input", sys.stdin.buffer.read()
    path = Path(file).expanduser()
    try:
        return file, path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file", where=file, hint="Check the path, or use - for standard input") from error
    except IsADirectoryError as error:
        raise DataError("is a directory, not a file", where=file, hint="Give one file at a time") from error
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error


def _output_path(output: str) -> Path:
    """The output file; checked before the model runs."""
    path = Path(output).expanduser()
    if path.is_dir():
        raise StorageError(f"--output {output} is a directory", hint="Give a file name in it")
    if not path.parent.is_dir():
        raise StorageError(f"--output {output} cannot be written: {path.parent} does not exist", hint="Create the directory")
    return path


def _write(path: Path | None, content: bytes) -> None:
    if path is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _report(tally: "Tally", results: int, filler: "Filler") -> None:
    kind = "edit" if filler.usage.task == "correct" else "gap"
    counts = tally.vocabulary
    windows, passes = _plural(tally.windows, "window", "windows"), _plural(tally.passes, "pass", "passes")
    print(f"{_plural(results, kind, kind + 's')}, {windows} in {passes}, {counts.tokens} source tokens", file=sys.stderr)
    untrained = [
        f"{count} {name}"
        for count, name in (
            (counts.unknown, "characters without a piece"),
            (counts.spelled, "byte pieces (characters encoded as bytes)"),
            (counts.untrained, "pieces that this model was not trained on"),
        )
        if count
    ]
    if untrained:
        print(f"outside of the trained vocabulary, so less reliable: {'; '.join(untrained)}", file=sys.stderr)


def _plural(count: int, singular: str, plural: str) -> str:
    return f"{count} {singular if count == 1 else plural}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/restore", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="exported directory, run directory, or hub:NAME")
    add("file", metavar="FILE", nargs="?", default="-", help="text file; - (default) is standard input")
    add("--mark", action="append", help="text that marks a gap ([?]); repeatable")
    add("--encoding", default="auto", help="encoding of the text (auto: detected, as for a corpus)")
    add("--output", default=None, metavar="FILE", help="output file instead of standard output, written atomically")
    add("--json", action="store_true", help="write one JSON object per gap or edit instead of the text")
    add("--alternatives", type=int, default=0, metavar="N", help="alternative fills per gap (with --json)")
    add("--beams", type=int, default=1, metavar="N", help="beam size (1: greedy)")
    add("--document", choices=("auto", "file", "blank_line", "line"), help="document unit (default: as trained)")
    add("--max_source_tokens", type=int, metavar="N", help="maximum window length (default: as trained)")
    add("--max_sentinels", type=int, metavar="N", help="maximum gaps per window (default: as trained)")
    add(
        "--batch_tokens",
        type=int,
        default=4096,
        metavar="N",
        help="source tokens per batch; affects speed and memory only",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (auto: the GPU if there is one)")
    return parser
