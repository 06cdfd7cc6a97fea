"""bin/restore: fill the gaps of a text, or correct it, with a trained model; every other byte stays unchanged."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilient_t5.commands.failure import reported
from resilient_t5.errors import ConfigError, DataError, ExitCode, StorageError, plural
from resilient_t5.files import write_whole

if TYPE_CHECKING:
    from resilient_t5.restoration.filler import Filler, FillStatistics
    from resilient_t5.restoration.text_encoding import TextBytes

DESCRIPTION = """Fill the gaps of a text with a trained model, or correct a text with a model trained for it.

MODEL is an exported directory, a run directory (its best export is used), or hub:NAME for a model of the Hugging Face
hub. The text is read from FILE or standard input and written to standard output in the same encoding."""
EPILOG = (
    "exit codes: 0 done; 2 usage; 65 no gap in the text, no T5 in MODEL, or text in an encoding that is not supported; "
    "74 input/output; 130 interrupted"
)
MIN_PROBABILITY = 1e-12


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/restore` and return its exit code."""
    return reported(lambda: _restore(sys.argv[1:] if argv is None else argv))


def _restore(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    # Imported here so that --help and usage errors do not wait for torch.
    from resilient_t5.restoration.beam_search import DecodeSettings
    from resilient_t5.restoration.filler import FillStatistics, open_filler
    from resilient_t5.restoration.gaps import DEFAULT_MARK, find_gaps
    from resilient_t5.training.hardware.machine import choose_device

    target = None if arguments.output is None else _output_path(arguments.output)
    marks = arguments.mark or [DEFAULT_MARK]
    find_gaps("", marks)  # reports an invalid mark before the input is read
    text = _read_text(arguments.file, arguments.encoding)
    settings = DecodeSettings(arguments.beams, arguments.alternatives, arguments.batch_tokens, text.encoding)
    filler, has_config = open_filler(
        arguments.model,
        device=choose_device(arguments.device),
        max_source_tokens=arguments.max_source_tokens,
        max_sentinels=arguments.max_sentinels,
        document=arguments.document,
    )
    if not has_config:
        _log("the model has no restoration.json; using the defaults of T5: 27 gaps, 512 source tokens, 256 target tokens")
    statistics = FillStatistics()
    if filler.config.task == "correct":
        rows, places = _corrected(filler, text, settings, statistics)
    else:
        rows, places = _filled(filler, text, marks, settings, statistics)
    if arguments.json:
        output = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        output = text.replaced(places)
    _write(target, output)
    _log_statistics(statistics, len(rows), filler)
    return ExitCode.OK


def _read_text(file: str, encoding: str) -> "TextBytes":
    """Read and decode the input. Errors name the option --encoding where a corpus has a setting."""
    from resilient_t5.restoration.text_encoding import TextBytes

    name, raw = _read(file)
    try:
        return TextBytes.read(raw, name, encoding)
    except ConfigError as error:
        raise ConfigError(*(problem.replace("data.encoding", "--encoding") for problem in error.problems)) from None
    except DataError as error:
        hint = error.hint.replace("data.encoding", "--encoding")
        raise DataError(error.what.replace("data.encoding", "--encoding"), where=error.where, hint=hint) from None


def _filled(
    filler: "Filler", text: "TextBytes", marks: list[str], settings: Any, statistics: "FillStatistics"
) -> tuple[list[dict[str, Any]], list[tuple[int, int, str]]]:
    """JSON rows and replacements (start, end, text) of all gaps."""
    from resilient_t5.restoration.gaps import find_gaps, other_marks

    gaps = find_gaps(text.text, marks)
    if not gaps and text.text.strip("\ufeff"):
        others = other_marks(text.text, marks)
        hint = f"It contains {', '.join(others)}: give --mark '{others[0]}'" if others else "Give its mark with --mark"
        raise DataError(f"no gap: the text does not contain {' or '.join(marks)}", where=text.name, hint=hint)
    (predictions,) = filler.fill([(text.text, gaps)], settings, statistics)
    lines = _lines(text.text, [prediction.gap.start for prediction in predictions])
    rows = [
        {
            "gap": number,
            "offset": prediction.gap.start,
            "line": line,
            "mark": prediction.gap.mark,
            "fill": prediction.text,
            "probability": _rounded(prediction.probability),
            "alternatives": [{"fill": other, "probability": _rounded(value)} for other, value in prediction.alternatives],
        }
        for number, (prediction, line) in enumerate(zip(predictions, lines, strict=True))
    ]
    return rows, [(prediction.gap.start, prediction.gap.end, prediction.text) for prediction in predictions]


def _corrected(
    filler: "Filler", text: "TextBytes", settings: Any, statistics: "FillStatistics"
) -> tuple[list[dict[str, Any]], list[tuple[int, int, str]]]:
    """JSON rows and replacements (start, end, text) of all edits."""
    from resilient_t5.restoration.correction import correct

    edits = correct(filler, text.text, settings, statistics)
    rows = [
        {
            "edit": number,
            "offset": edit.start,
            "line": line,
            "before": edit.before,
            "after": edit.after,
            "probability": _rounded(edit.probability),
        }
        for number, (edit, line) in enumerate(zip(edits, _lines(text.text, [edit.start for edit in edits]), strict=True))
    ]
    return rows, [(edit.start, edit.end, edit.after) for edit in edits]


def _lines(text: str, offsets: Sequence[int]) -> list[int]:
    """Return the line number, from 1, of each of the ascending offsets."""
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
    """Check the output path before the work starts."""
    path = Path(output).expanduser()
    if path.is_dir():
        raise StorageError(f"--output {output} is a directory", hint="Name a file in it")
    if not path.parent.is_dir():
        raise StorageError(f"--output {output} cannot be written: no directory {path.parent}", hint="Create it first")
    return path


def _write(path: Path | None, content: bytes) -> None:
    if path is not None:
        write_whole(path, content)
        return
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _log_statistics(statistics: "FillStatistics", count: int, filler: "Filler") -> None:
    what = plural(count, "edit" if filler.config.task == "correct" else "gap")
    windows, passes = plural(statistics.windows, "window"), plural(statistics.passes, "pass", "passes")
    _log(f"{what}, {windows} in {passes}, {plural(statistics.tokens, 'token')} read")
    notes = [
        f"{number} {name}"
        for number, name in (
            (statistics.unknown, "characters without a piece"),
            (statistics.byte_pieces, "byte pieces (characters spelled in bytes)"),
            (statistics.untrained, "pieces that this model was not trained on"),
        )
        if number
    ]
    if notes:
        _log(f"tokens outside the trained vocabulary, which the model does not represent well: {'; '.join(notes)}")


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/restore", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="exported directory, run directory, or hub:NAME")
    add("file", metavar="FILE", nargs="?", default="-", help="the text; - (the default) is standard input")
    add("--mark", action="append", help="mark of a gap ([?]); may be given several times")
    add("--encoding", default="auto", help="encoding of the text (auto: detected, as for a corpus)")
    add("--output", default=None, metavar="FILE", help="write atomically to FILE instead of standard output")
    add("--json", action="store_true", help="write one JSON object per gap or edit instead of the text")
    add("--alternatives", type=int, default=0, metavar="N", help="alternative answers to list for each gap (with --json)")
    add("--beams", type=int, default=1, metavar="N", help="hypotheses of the search (1: greedy)")
    add("--document", choices=("auto", "file", "blank_line", "line"), help="how the text is cut into documents (as trained)")
    add("--max_source_tokens", type=int, metavar="N", help="longest window (as trained)")
    add("--max_sentinels", type=int, metavar="N", help="most gaps in one window (as trained)")
    add("--batch_tokens", type=int, default=4096, metavar="N", help="source tokens in a batch; affects speed and memory only")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to compute on")
    return parser
