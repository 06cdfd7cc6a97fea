"""Readers of recorded runs: our metrics.jsonl, TensorBoard, trainer_state.json, CSV, and files of curves.

Files come from strangers: sizes are bounded, numbers are checked, and what is wrong is told with its file and line.
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


def read_curves(path: Path, tag: str | None = None) -> list[Curve]:
    """Every curve that `path` holds.

    Args:
        path: a file, a run directory, or a directory of event files.
        tag: name of the evaluation loss in a CSV, an event file or a trainer_state.json, when it is not guessed right.

    Raises:
        DataError: nothing there, no evaluation loss in it, or not what it claims to be.
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
    """The lines of a text, packed or not, as ("path:line", text); bounded, so that a packed bomb stays small."""
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
    """A metrics.jsonl of ours, or one curve per line; the first object tells which."""
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
    # Only a run of ours may end in a torn line, as a kill leaves it.
    ours = bool(rows) and "eval" not in rows[0][1] and "kind" in rows[0][1]
    if torn and not ours:
        raise DataError("not a JSON object", where=torn)
    if not rows:
        raise DataError("the file is empty", where=str(path))
    if ours:
        return [_our_run(path, rows)]
    return [_curve_of(row, where) for where, row in rows]


def _curve_of(row: Mapping[str, Any], where: str) -> Curve:
    if "eval" not in row:
        raise DataError('a curve wants "eval": [[update, loss], ...]', where=where)
    length = row.get("window_updates")
    if length is not None and (not isinstance(length, (int, float)) or isinstance(length, bool) or not length > 0):
        raise DataError("window_updates is not a number above 0", where=where)
    return Curve(
        name=str(row.get("name", where)),
        evaluations=_rising(_pairs(row["eval"], where), where),
        training=_rising(_pairs(row.get("train") or [], where), where, needed=False),
        group=str(row.get("group", "")),
        window_length=length,
    )


def _our_run(path: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> Curve:
    """A run of ours: the windows and the verdicts as they were, where it wrote them down."""
    points: list[tuple[float, float]] = []
    training: list[tuple[float, float]] = []
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
            recorded.append(Recorded(int(pair[0][0]), str(row["phase"]), str(row.get("why", ""))))
    if any(later.update <= earlier.update for earlier, later in zip(windows[:-1], windows[1:], strict=True)):
        raise DataError("the evaluations do not follow each other", where=str(path))
    name = path.parent.name if path.name == "metrics.jsonl" else path.name
    return Curve(
        name=name or str(path),
        evaluations=_rising(points, str(path)),
        training=_rising(training, str(path), needed=False),
        windows=tuple(windows) if len(windows) == len(points) else (),
        rules=rules,
        window_rules=tuple(window_rules) if len(window_rules) == len(points) else (),
        recorded=tuple(recorded),
    )


def window_of_row(values: Mapping[str, Any], where: str) -> Window:
    """A window as `dataclasses.asdict` and a JSON line gave it; a non-finite number stands there as a string.

    Raises:
        DataError: a key is missing or unknown, or a value is no number.
    """
    try:
        numbers = {key: value and _number(value) for key, value in values.items() if key not in ("update", "tokens", "series")}
        series = {str(name): _number(value) for name, value in dict(values["series"]).items()}
        return Window(update=int(values["update"]), tokens=int(values["tokens"]), series=series, **numbers)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the recorded window is damaged: {error}", where=where) from None


def _trainer_state(path: Path, tag: str | None) -> list[Curve]:
    """The log of a Hugging Face Trainer."""
    try:
        history = json.loads("".join(line for _, line in _lines(path)))["log_history"]
        entries = [dict(entry) for entry in history]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, ValueError):
        raise DataError("not a trainer_state.json: no log_history", where=str(path)) from None
    where, key = str(path), tag or "eval_loss"
    points = _pairs([[entry.get("step"), entry[key]] for entry in entries if key in entry], where)
    training = _pairs([[entry.get("step"), entry["loss"]] for entry in entries if "loss" in entry], where)
    return [Curve(path.parent.name or path.name, _rising(points, where), _rising(training, where, needed=False))]


def _csv(path: Path, tag: str | None) -> list[Curve]:
    """A table with a header; the evaluation loss and the position are found by their names."""
    lines = list(_lines(path))
    header = lines[0][1] if lines else ""
    separator = max(",\t;", key=header.count)
    table = list(csv.reader((line for _, line in lines), delimiter=separator))
    names = [_plain_name(name) for name in table[0]] if table else []
    loss = _find(names, (_plain_name(tag),) if tag else (*EVALUATION_NAMES, "loss"))
    if loss is None:
        raise DataError(
            f"no column of an evaluation loss among {', '.join(names[:20])}", where=str(path), hint="Name it: --tag"
        )
    train, position = _find(names, TRAINING_NAMES), _find(names, POSITION_NAMES)
    points: list[tuple[float, float]] = []
    training: list[tuple[float, float]] = []
    for number, cells in enumerate(table[1:], 1):
        where = f"{path}:{number + 1}"
        for column, pairs in ((loss, points), (train if train != loss else None, training)):
            if column is not None and column < len(cells) and cells[column].strip():
                at = cells[position] if position is not None and position < len(cells) else number
                pairs += _pairs([[at, cells[column]]], where)
    return [Curve(path.name, _rising(points, str(path)), _rising(training, str(path), needed=False))]


def _tensorboard(path: Path, tag: str | None) -> list[Curve]:
    """Every run below `path` that holds an evaluation loss."""
    # Imported late: only this form needs it, and it takes a second.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directories = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    curves = []
    for directory in directories:
        log = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
        log.Reload()
        series = _scalars(log)
        tags = list(series)
        names = [_plain_name(name) for name in tags]
        found = _find(names, (_plain_name(tag),) if tag else EVALUATION_NAMES)
        if found is None:
            continue
        train = _find(names, TRAINING_NAMES)
        where = str(directory)
        points, training = (
            [] if index is None else [(float(update), value) for update, value in series[tags[index]]]
            for index in (found, train)
        )
        name = directory.name if directory != path else path.resolve().name
        curves.append(Curve(name, _rising(points, where), _rising(training, where, needed=False)))
    if not curves:
        problem = "no event file with an evaluation loss" if directories else "nothing here that can be replayed"
        raise DataError(problem, where=str(path), hint=f"Name the tag with --tag, or give {FORMS}")
    return curves


def _scalars(log: "EventAccumulator") -> dict[str, list[tuple[int, float]]]:
    """(update, value) of every scalar tag; TensorFlow 2 writes a scalar as a tensor without a dimension."""
    from tensorboard.util.tensor_util import make_ndarray

    series = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    for tag in log.Tags()["tensors"]:
        if log.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            series[tag] = [(event.step, float(make_ndarray(event.tensor_proto))) for event in log.Tensors(tag)]
    return series


def _find(names: list[str], wanted: Iterable[str]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _pairs(values: Any, where: str) -> list[tuple[float, float]]:
    """(position, loss) of each entry; the position finite and not negative."""
    try:
        pairs = [(_number(position), _number(loss)) for position, loss in values]
    except (TypeError, ValueError, OverflowError):
        raise DataError("not a pair of numbers [update, loss]", where=where) from None
    if any(not (math.isfinite(position) and position >= 0) for position, _ in pairs):
        raise DataError("an update is negative or not finite", where=where)
    return pairs


def _number(value: Any) -> float:
    """A number from JSON or CSV; a missing loss is not a number, and stays one."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    return math.nan if value is None else float(value)


def _rising(pairs: Iterable[tuple[float, float]], where: str, needed: bool = True) -> tuple[tuple[float, float], ...]:
    """Sorted by position; of two at one position the later record stands, since a resumed run repeats updates."""
    latest = dict(pairs)
    if needed and not latest:
        raise DataError("no evaluation loss in it", where=where, hint="Name it with --tag, or give another file")
    return tuple(sorted(latest.items()))
