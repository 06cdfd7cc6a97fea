"""bin/restore: fill the gaps of a text, or correct it, with a trained model; every other byte stays as it is."""

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

DESCRIPTION = """Fill the gaps of a text with a trained model, or correct it with one that was trained so.

MODEL is an exported directory or a run directory (its best export is taken); hub:NAME is a model of the Hugging Face
hub. The text comes from FILE or from standard input, and goes to standard output in the encoding it came in."""
EPILOG = (
    "exit codes: 0 done; 2 usage; 65 no gap in the text, no T5 in MODEL, or text in an encoding that cannot be read; "
    "74 input/output; 130 interrupted"
)
MIN_PROBABILITY = 1e-12


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/restore` and return its exit code."""
    return reported(lambda: _restore(sys.argv[1:] if argv is None else argv))


def _restore(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    # Imported late: --help and a typo must not wait for torch.
    from resilient_t5.restoration.decode import DecodeSettings
    from resilient_t5.restoration.filler import Tally, open_filler
    from resilient_t5.restoration.gaps import DEFAULT_MARK, find_gaps
    from resilient_t5.restoration.text_encoding import TextBytes
    from resilient_t5.training.hardware.machine import choose_device

    target = None if arguments.output is None else _target(arguments.output)
    marks = arguments.mark or [DEFAULT_MARK]
    find_gaps("", marks)  # a mark that is none is a usage error, before anything is read
    name, raw = _read(arguments.file)
    try:
        text = TextBytes.read(raw, name, arguments.encoding)
    except ResilientError as error:  # a corpus has a setting where this command has an option
        raise type(error)(*(str(part).replace("data.encoding", "--encoding") for part in error.args), **_told(error)) from None
    asking = DecodeSettings(arguments.beams, arguments.alternatives, arguments.batch_tokens, text.encoding)
    filler, known = open_filler(
        arguments.model,
        device=choose_device(arguments.device),
        max_source_tokens=arguments.max_source_tokens,
        max_sentinels=arguments.max_sentinels,
        document=arguments.document,
    )
    if not known:
        _tell("the model does not say how it was trained: 27 gaps, 512 tokens in and 256 out are taken, as for T5")
    tally = Tally()
    if filler.usage.task == "correct":
        rows, places = _corrected(filler, text, asking, tally)
    else:
        rows, places = _filled(filler, text, marks, asking, tally)
    output = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode() if arguments.json else None
    _write(target, text.replaced(places) if output is None else output)
    _report(tally, len(rows), filler)
    return ExitCode.OK


def _told(error: ResilientError) -> dict[str, str]:
    """Place and cure of an error that has them, in the words of this command."""
    if not error.hint:
        return {}
    return {"where": error.where, "hint": error.hint.replace("data.encoding", "--encoding")}


def _filled(
    filler: "Filler", text: "TextBytes", marks: list[str], asking: Any, tally: "Tally"
) -> tuple[list[dict[str, Any]], list[tuple[int, int, str]]]:
    from resilient_t5.restoration.gaps import find_gaps, other_marks

    gaps = find_gaps(text.text, marks)
    if not gaps and text.text.strip("\ufeff"):
        others = other_marks(text.text, marks)
        hint = f"It holds {', '.join(others)}: give --mark '{others[0]}'" if others else "Name the text's own with --mark"
        raise DataError(f"no gap: {' or '.join(marks)} does not stand in the text", where=text.name, hint=hint)
    fills = (filler.fill([(text.text, gaps)], asking, tally) or [[]])[0]
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


def _corrected(
    filler: "Filler", text: "TextBytes", asking: Any, tally: "Tally"
) -> tuple[list[dict[str, Any]], list[tuple[int, int, str]]]:
    from resilient_t5.restoration.correction import correct

    edits = correct(filler, text.text, asking, tally) or []
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
    """The line, from 1, of each of the ascending offsets."""
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
        raise DataError("no such file", where=file, hint="Check the path, or give - for standard input") from error
    except IsADirectoryError as error:
        raise DataError("a folder, not a text", where=file, hint="Give one file at a time") from error
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error


def _target(output: str) -> Path:
    """The file to write, refused before the work and not after it where there is no place for it."""
    path = Path(output).expanduser()
    if path.is_dir():
        raise StorageError(f"--output {output} is a folder", hint="Name a file in it")
    if not path.parent.is_dir():
        raise StorageError(f"--output {output} cannot be written: there is no folder {path.parent}", hint="Make it first")
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


def _report(tally: "Tally", found: int, filler: "Filler") -> None:
    what = "edits" if filler.usage.task == "correct" else "gaps"
    seen = tally.vocabulary
    _tell(f"{found} {what}, {tally.windows} windows in {tally.passes} passes, {seen.tokens} tokens read")
    notes = [
        f"{count} {name}"
        for count, name in (
            (seen.unknown, "characters without a piece"),
            (seen.spelled, "byte pieces (characters spelled in bytes)"),
            (seen.untrained, "pieces that this model was not trained on"),
        )
        if count
    ]
    if notes:
        _tell(f"outside the trained vocabulary, so the model knows little of them: {'; '.join(notes)}")


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/restore", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="exported directory, run directory, or hub:NAME")
    add("file", metavar="FILE", nargs="?", default="-", help="the text; - (the default) is standard input")
    add("--mark", action="append", help="what stands for a gap ([?]); may be given several times")
    add("--encoding", default="auto", help="encoding of the text (auto: by evidence, as for a corpus)")
    add("--output", default=None, metavar="FILE", help="write there instead of standard output, whole or not at all")
    add("--json", action="store_true", help="write one JSON object per gap or edit instead of the text")
    add("--alternatives", type=int, default=0, metavar="N", help="other answers to list for each gap (with --json)")
    add("--beams", type=int, default=1, metavar="N", help="hypotheses of the search (1: greedy)")
    add("--document", choices=("auto", "file", "blank_line", "line"), help="what a document is (as trained)")
    add("--max_source_tokens", type=int, metavar="N", help="longest window (as trained)")
    add("--max_sentinels", type=int, metavar="N", help="most gaps in one window (as trained)")
    add("--batch_tokens", type=int, default=4096, metavar="N", help="source tokens in a batch; speed and memory only")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return parser
