"""`best.json` and `last.json`: small files for people and scripts. They are hints; the scan of checkpoints is the truth."""

from pathlib import Path

from resilient_t5.checkpoint import strict_json
from resilient_t5.checkpoint.manifest import parse_name
from resilient_t5.checkpoint.retention import Stored
from resilient_t5.files import FileSystem, read_bounded, replace_file

BEST = "best.json"
LAST = "last.json"
TEMPORARY_PREFIXES = (f".tmp-{BEST}-", f".tmp-{LAST}-")
LIMIT_BYTES = 64 * 2**10


def write_pointer(fs: FileSystem, path: Path, item: Stored) -> None:
    """Point `path` at a committed checkpoint, atomically and durably."""
    manifest = item.manifest
    fields = {"name": item.name, "q": item.q, "update": manifest.update, "metric": manifest.metric}
    replace_file(fs, path, strict_json.dump({**fields, "manifest_sha256": item.manifest_sha256}))


def pointed_q(fs: FileSystem, path: Path) -> int:
    """The commit number in a pointer, a lower bound of those ever used.

    Returns:
        0 without a pointer; 1 for a damaged one, since it proves that something was committed.
    """
    try:
        fields = strict_json.load(read_bounded(fs, path, LIMIT_BYTES))
        return (parse_name(str(fields["name"])) or (0, 1))[1]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError):
        return 1
