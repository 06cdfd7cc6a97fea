"""Readers of recorded runs: metrics.jsonl, TensorBoard, trainer_state.json, CSV, and files of curves.

The files are untrusted input: sizes are bounded, numbers are checked, and errors name the file and the line.
"""

import csv
import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from resilient_t5.errors import DataError
from resilient_t5.training.convergence.phases import Window
from resilient_t5.training.convergence.replay import Curve, Recorded
from resilient_t5.training.convergence.rules import Rules

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LINE_BYTES_MAX = 1 << 26
FILE_BYTES_MAX = 1 << 31
EVALUATION_NAMES = ("evaluation_loss", "eval_loss", "validation_loss", "val_loss", "valid_loss", "dev_loss", "test_loss")
TRAINING_NAMES = ("train_loss", "training_loss", "loss_train", "loss")
POSITION_NAMES = ("update", "updates", "global_step", "step", "steps", "iteration", "iter", "epoch")
FORMS = "a metrics.jsonl, a TensorBoard directory, a trainer_state.json, a CSV, or a .jsonl(.gz) of curves"
STATISTICS_PREFIX = "convergence_"
Pairs = list[tuple[float, float]]


def read_curves(path: Path, tag: str | None = None) -> list[Curve]:
    """Read all curves in `path`.

    Args:
        path: a file, a run directory, or a directory of event files.
        tag: name of the evaluation loss in a CSV, an event file or a trainer_state.json; by default a usual name.

    Raises:
        DataError: the path does not exist, has no evaluation loss, or is not in a known format.
    """
    if path.is_dir():
        for name, reader in (("metrics.jsonl", _jsonl), ("trainer_state.json", _trainer_state)):
            if (path / name).is_file():
                return reader(path / name, tag)
        return _tensorboard(path, tag)
    if not path.is_file():
        raise DataError("no such file or directory", where=str(path), hint=f"Give {FORMS}")
    name = path.name.lower().removesuffix(".gz")
    by_suffix = {".jsonl": _jsonl, ".json": _trainer_state, ".csv": _csv, ".tsv": _csv}
    if Path(name).suffix in by_suffix:
        return by_suffix[Path(name).suffix](path, tag)
    if "tfevents" in name:
        return _tensorboard(path.parent, tag)
    raise DataError("not a kind of file that can be replayed", where=str(path), hint=f"Give {FORMS}")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("path:line", text) of a plain or gzip text; bounded, because a small gzip file may expand without end."""
    total = 0
    try:
        with _open(path) as file:
            for number in range(1, FILE_BYTES_MAX):
                line = file.readline(LINE_BYTES_MAX)
                total += len(line)
                if not line:
                    return
                if total > FILE_BYTES_MAX or len(line) == LINE_BYTES_MAX:
                    raise DataError("the file is too large to be a record of losses", where=f"{path}:{number}")
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _jsonl(path: Path, tag: str | None) -> list[Curve]:
    """Read a metrics.jsonl of ours, or one curve per line, depending on the first object."""
    rows: list[tuple[str, dict[str, Any]]] = []
    torn = ""
    for where, line in _lines(path):
        if torn:
            raise DataError("not a JSON object", where=torn)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            torn = where
            continue
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=where)
        rows.append((where, row))
    # Only a run of ours may end in a torn line, which a kill leaves.
    is_ours = bool(rows) and "eval" not in rows[0][1] and "kind" in rows[0][1]
    if torn and not is_ours:
        raise DataError("not a JSON object", where=torn)
    if not rows:
        raise DataError("the file is empty", where=str(path))
    return [_own_run(path, rows)] if is_ours else [_curve_of(row, where) for where, row in rows]


def _curve_of(row: Mapping[str, Any], where: str) -> Curve:
    if "eval" not in row:
        raise DataError('a curve needs "eval": [[update, loss], ...]', where=where)
    length = row.get("window_updates")
    if length is not None and (not isinstance(length, (int, float)) or isinstance(length, bool) or not length > 0):
        raise DataError("window_updates is not a number above 0", where=where)
    name, group = str(row.get("name", where)), str(row.get("group", ""))
    return _curve(name, _pairs(row["eval"], where), _pairs(row.get("train") or [], where), where, group, length)


def _own_run(path: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> Curve:
    """Read a run of ours, with the windows, rules and verdicts that it recorded."""
    points: Pairs = []
    training: Pairs = []
    windows: list[Window] = []
    recorded: list[Recorded] = []
    rules: Rules | None = None
    window_rules: list[Rules] = []
    for where, row in rows:
        kind = row.get("kind")
        if kind == "start" and isinstance(row.get("rules"), dict):
            rules = Rules.from_dict(row["rules"], where)
        if kind not in ("evaluation", "train") or "loss" not in row:
            continue
        pair = _pairs([[row.get("update"), row["loss"]]], where)
        if kind == "train":
            training += pair
            continue
        points += pair
        if isinstance(row.get("window"), dict):
            windows.append(window_of_row(row["window"], where))
            window_rules += [rules] if rules else []
        if "phase" in row:
            recorded.append(_verdict_of(row, int(pair[0][0])))
    if any(later.update <= earlier.update for earlier, later in zip(windows[:-1], windows[1:], strict=True)):
        raise DataError("the evaluations do not follow each other", where=str(path))
    name = path.parent.name if path.name == "metrics.jsonl" else path.name
    return Curve(
        name=name or str(path),
        evaluations=_rising(points, str(path)),
        training=_rising(training, str(path), required=False),
        windows=tuple(windows) if len(windows) == len(points) else (),
        rules=rules,
        window_rules=tuple(window_rules) if len(window_rules) == len(points) else (),
        recorded=tuple(recorded),
    )


def _verdict_of(row: Mapping[str, Any], update: int) -> Recorded:
    statistics = {key.removeprefix(STATISTICS_PREFIX): row[key] for key in row if key.startswith(STATISTICS_PREFIX)}
    return Recorded(update, str(row["phase"]), {key: value for key, value in statistics.items() if key != "phase"})


def window_of_row(values: Mapping[str, Any], where: str) -> Window:
    """Read a window that was written as a JSON object, with non-finite numbers as strings.

    Raises:
        DataError: a key is missing or unknown, or a value is not a number.
    """
    try:
        numbers = {key: value and _number(value) for key, value in values.items() if key not in ("update", "tokens", "series")}
        series = {str(name): _number(value) for name, value in dict(values["series"]).items()}
        return Window(update=int(values["update"]), tokens=int(values["tokens"]), series=series, **numbers)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the recorded window is damaged: {error}", where=where) from None


def _trainer_state(path: Path, tag: str | None) -> list[Curve]:
    """Read the log of a Hugging Face Trainer."""
    try:
        history = json.loads("".join(line for _, line in _lines(path)))["log_history"]
        entries = [dict(entry) for entry in history]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, ValueError):
        raise DataError("not a trainer_state.json: no log_history", where=str(path)) from None
    where, key = str(path), tag or "eval_loss"
    points = _pairs([[entry.get("step"), entry[key]] for entry in entries if key in entry], where)
    training = _pairs([[entry.get("step"), entry["loss"]] for entry in entries if "loss" in entry], where)
    return [_curve(path.parent.name or path.name, points, training, where)]


def _csv(path: Path, tag: str | None) -> list[Curve]:
    """Read a table with a header; evaluation loss and position are found by their names."""
    lines = list(_lines(path))
    header = lines[0][1] if lines else ""
    separator = max(",\t;", key=header.count)
    table = list(csv.reader((line for _, line in lines), delimiter=separator))
    names = [_plain_name(name) for name in table[0]] if table else []
    loss = _find(names, (_plain_name(tag),) if tag else (*EVALUATION_NAMES, "loss"))
    if loss is None:
        problem = f"no column of an evaluation loss among {', '.join(names[:20])}"
        raise DataError(problem, where=str(path), hint="Name it: --tag")
    train, position = _find(names, TRAINING_NAMES), _find(names, POSITION_NAMES)
    points: Pairs = []
    training: Pairs = []
    for number, cells in enumerate(table[1:], 1):
        where = f"{path}:{number + 1}"
        for column, pairs in ((loss, points), (train if train != loss else None, training)):
            if column is not None and column < len(cells) and cells[column].strip():
                at = cells[position] if position is not None and position < len(cells) else number
                pairs += _pairs([[at, cells[column]]], where)
    return [_curve(path.name, points, training, str(path))]


def _tensorboard(path: Path, tag: str | None) -> list[Curve]:
    """Read every run under `path` that has an evaluation loss."""
    # Imported late: only this format needs it, and the import takes a second.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directories = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    curves = []
    for directory in directories:
        log = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
        log.Reload()
        series = [(_plain_name(name), values) for name, values in _scalars(log).items()]
        names = [name for name, _ in series]
        loss, train = _find(names, (_plain_name(tag),) if tag else EVALUATION_NAMES), _find(names, TRAINING_NAMES)
        if loss is None:
            continue
        name = directory.name if directory != path else path.resolve().name
        curves.append(_curve(name, series[loss][1], [] if train is None else series[train][1], str(directory)))
    if not curves:
        problem = "no event file with an evaluation loss" if directories else "nothing here that can be replayed"
        raise DataError(problem, where=str(path), hint=f"Name the tag with --tag, or give {FORMS}")
    return curves


def _scalars(log: "EventAccumulator") -> dict[str, Pairs]:
    """(update, value) of every scalar tag; TensorFlow 2 writes a scalar as a zero-dimensional tensor."""
    from tensorboard.util.tensor_util import make_ndarray

    series = {tag: [(float(event.step), event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    for tag in log.Tags()["tensors"]:
        if log.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            series[tag] = [(float(event.step), float(make_ndarray(event.tensor_proto))) for event in log.Tensors(tag)]
    return series


def _find(names: list[str], candidates: Iterable[str]) -> int | None:
    return next((names.index(name) for name in candidates if name in names), None)


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _pairs(values: Any, where: str) -> Pairs:
    """(position, loss) of each entry; positions are finite and not negative."""
    try:
        pairs = [(_number(position), _number(loss)) for position, loss in values]
    except (TypeError, ValueError, OverflowError):
        raise DataError("not a pair of numbers [update, loss]", where=where) from None
    if any(not (math.isfinite(position) and position >= 0) for position, _ in pairs):
        raise DataError("an update is negative or not finite", where=where)
    return pairs


def _number(value: Any) -> float:
    """A number from JSON or CSV; a missing loss is NaN."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return math.nan if value is None else float(value)


def _curve(name: str, points: Pairs, training: Pairs, where: str, group: str = "", window_length: float | None = None) -> Curve:
    return Curve(name, _rising(points, where), _rising(training, where, required=False), group, window_length)


def _rising(pairs: Iterable[tuple[float, float]], where: str, required: bool = True) -> tuple[tuple[float, float], ...]:
    """Sort by position; the later record of a position wins, since a resumed run repeats updates."""
    latest = dict(pairs)
    if required and not latest:
        raise DataError("no evaluation loss in it", where=where, hint="Name it with --tag, or give another file")
    return tuple(sorted(latest.items()))
