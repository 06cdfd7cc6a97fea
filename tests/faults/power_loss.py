"""Which directories a power loss can leave, enumerated from the recorded calls of a real save.

Two models of a file system. `journal`: changes of names become durable in the order they were made, and any fsync makes
all earlier ones durable, as ext4 does. `weak`: until its directory is fsynced, every change of a name is durable or lost on its
own, which is all that POSIX guarantees. In both, a file that was not fsynced may have any of seven contents: what was written,
nothing, zeros, a half, all but the last byte, a tail of zeros, or garbage.
"""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

CONTENTS = {
    "full": lambda data: data,
    "empty": lambda data: b"",
    "zero": lambda data: bytes(len(data)),
    "truncated": lambda data: data[: len(data) // 2],
    "cut": lambda data: data[:-1],
    "zero tail": lambda data: data[:-10] + bytes(len(data[-10:])),
    "garbage": lambda data: bytes(byte ^ 0x5A for byte in data),
}
MAX_PENDING = 7
"""Pending changes of names of which all subsets are tried; beyond it, all but the subsets far from both ends."""


@dataclass(frozen=True)
class Change:
    """One change of names: each part is (directory, name, node or None), and all parts happen together."""

    parts: tuple[tuple[int, str, int | None], ...]
    moved_from: tuple[int, str] | None = None


@dataclass
class Disk:
    """What is durable, and what is not yet. Node 0 is the root; a node is a directory when it is in `names`."""

    names: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    pending: list[Change] = field(default_factory=list)
    written: dict[int, bytes] = field(default_factory=dict)
    durable: set[int] = field(default_factory=set)


class Recorder:
    """A hook that keeps what each call did; `acknowledge` marks the moment at which a save counts as done."""

    def __init__(self, root):
        self.root = Path(root)
        self.calls = []

    def __call__(self, moment, operation, arguments):
        if moment != "after":
            return
        subject = arguments[0].path if hasattr(arguments[0], "path") else arguments[0]
        path = Path(subject).relative_to(self.root)
        more = arguments[1:]
        if operation in ("rename", "replace"):
            more = (Path(more[0]).relative_to(self.root),)
        elif operation == "write":
            more = (bytes(more[0]),)
        self.calls.append((operation, path, *more))

    def acknowledge(self, q):
        """From here on the checkpoint with commit number `q` must survive."""
        self.calls.append(("acknowledge", Path("."), q))


def states(base, calls, model, acknowledged=0):
    """Yield (acknowledged q, {path: bytes, or None for a directory}) for every state a power loss may leave, each once.

    Args:
        base: the durable directory before the first call.
        calls: what a `Recorder` kept.
        model: "journal" or "weak".
        acknowledged: commit number that must survive from the start.
    """
    disk, seen = _durable(base), set()
    for call in [None, *calls]:
        if call is not None and call[0] == "acknowledge":
            acknowledged = call[2]
            continue
        if call is not None:
            _apply(disk, call, model)
        for chosen in _choices(disk.pending, model):
            names = _after(disk.names, chosen)
            for tree in _trees(disk, names):
                key = (acknowledged, frozenset(tree.items()))
                if key not in seen:
                    seen.add(key)
                    yield acknowledged, tree


def materialise(tree, directory):
    """Write a state to an empty directory."""
    for path, content in sorted(tree.items()):
        target = Path(directory) / path
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _durable(base):
    disk, nodes = Disk(), {Path("."): 0}
    for folder, folders, files in os.walk(base):
        here = Path(folder).relative_to(base)
        for name in sorted(folders) + sorted(files):
            node = nodes[here / name] = len(nodes)
            disk.names[nodes[here]][name] = node
            if name in folders:
                disk.names[node] = {}
            else:
                disk.written[node] = (Path(folder) / name).read_bytes()
                disk.durable.add(node)
    return disk


def _now(disk):
    return _after(disk.names, disk.pending)


def _find(names, path):
    node = 0
    for part in Path(path).parts:
        node = names[node][part]
    return node


def _apply(disk, call, model):
    operation, path, *more = call
    now = _now(disk)
    parent = _find(now, path.parent)
    if operation in ("make_directory", "open_new"):
        node = 1 + max([*disk.names, *disk.written, *(p[2] or 0 for change in disk.pending for p in change.parts)])
        if operation == "make_directory":
            disk.names[node] = {}
        else:
            disk.written[node] = b""
        disk.pending.append(Change(((parent, path.name, node),)))
    elif operation == "write":
        node = _find(now, path)
        disk.written[node] += more[0]
        disk.durable.discard(node)
    elif operation == "fsync":
        disk.durable.add(_find(now, path))
        if model == "journal":
            _settle(disk, lambda change: True)
    elif operation == "fsync_directory":
        node = _find(now, path)
        _settle(disk, lambda change: model == "journal" or any(part[0] == node for part in change.parts))
    elif operation in ("rename", "replace"):
        target = _find(now, more[0].parent)
        moved = ((target, more[0].name, _find(now, path)), (parent, path.name, None))
        disk.pending.append(Change(moved, moved_from=(parent, path.name)))
    elif operation in ("unlink", "remove_directory"):
        disk.pending.append(Change(((parent, path.name, None),)))


def _settle(disk, is_durable):
    disk.names = _after(disk.names, [change for change in disk.pending if is_durable(change)])
    disk.pending = [change for change in disk.pending if not is_durable(change)]


def _after(names, changes):
    after = {node: dict(entries) for node, entries in names.items()}
    for change in changes:
        if change.moved_from is not None and change.moved_from[1] not in after[change.moved_from[0]]:
            continue
        for node, name, value in change.parts:
            if value is None:
                after[node].pop(name, None)
            else:
                after[node][name] = value
    return after


def _choices(pending, model):
    count = len(pending)
    if model == "journal":
        return [pending[:length] for length in range(count + 1)]
    sizes = range(count + 1) if count <= MAX_PENDING else (0, 1, 2, count - 2, count - 1, count)
    subsets = [subset for size in sizes for subset in itertools.combinations(pending, size)]
    return subsets if count <= MAX_PENDING else subsets + [tuple(pending[:length]) for length in range(count + 1)]


def _trees(disk, names):
    """All contents of the reachable files: all written, each one damaged alone, and all damaged in the same way."""
    reached = dict(_walk(names, 0, Path(".")))
    loose = sorted({node for node in reached.values() if node in disk.written and node not in disk.durable})
    kinds = [kind for kind in CONTENTS if kind != "full"]
    variants = [{}] + [{node: kind} for node in loose for kind in kinds]
    variants += [dict.fromkeys(loose, kind) for kind in kinds if len(loose) > 1]
    for variant in variants:
        yield {
            str(path): None if node in names else CONTENTS[variant.get(node, "full")](disk.written[node])
            for path, node in reached.items()
        }


def _walk(names, node, path):
    for name, child in names[node].items():
        yield path / name, child
        if child in names:
            yield from _walk(names, child, path / name)
