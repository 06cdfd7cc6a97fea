"""Identity of a store: the content of the inputs, the tokenizer, the terms and the relevant settings.

Content counts, not paths: a corpus that was moved is the same corpus. A file with the recorded path, size and modification time
is not read again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resilient_t5 import hub
from resilient_t5.config.schema import Config
from resilient_t5.data.corpus.documents import find_inputs
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.store.store import FORMAT, TOKENIZER_RECORD, sha256_of
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer, check_rows, load_tokenizer, tokenizer_files
from resilient_t5.errors import DataError

BUILTIN = "builtin:clinical"
CONTENT_KEYS = ("data.train", "data.validation", "data.terms")


@dataclass
class Fingerprint:
    """`values` determine the content of a store; `inputs` are its files; `tokenizer` is set when it had to be loaded."""

    values: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: TextTokenizer | None = None

    def fingerprint(self) -> str:
        """sha256 of `values`."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


def identify(config: Config, recorded: dict[str, Any] | None) -> Fingerprint:
    """The identity of the store that `config` asks for.

    Args:
        recorded: `meta.json` of an existing store, whose digests are reused for files that did not change.

    Raises:
        DataError: inputs, terms or tokenizer that are missing.
    """
    identity = Fingerprint()
    known = {entry["path"]: entry for entry in (recorded or {}).get("inputs", ())}
    data = config.data
    if is_builtin(config):
        notes = "".join(f"{note.text}\n" for note in generate_notes(data.sample_notes, config.run.seed))
        identity.values["data.train"] = hashlib.sha256(notes.encode()).hexdigest()
    else:
        identity.values["data.train"] = _digest(identity, "data.train", find_inputs(data.train_inputs()), known)
    if data.validation_inputs():
        identity.values["data.validation"] = _digest(identity, "data.validation", find_inputs(data.validation_inputs()), known)
    else:
        identity.values["data.validation_share"] = data.validation_share
    if data.terms is not None:
        identity.values["data.terms"] = _digest(identity, "data.terms", [terms_path(data.terms)], known)
    keys = ("max_source_tokens", "max_target_tokens", "overlap_tokens", "encoding", "document", "text_field", "column")
    identity.values.update({f"data.{key}": getattr(data, key) for key in keys})
    _identify_tokenizer(identity, config, recorded, known)
    identity.values["format"] = FORMAT
    return identity


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences between two identities, each naming its key."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if key in CONTENT_KEYS and before is not None and after is not None:
            found.append(f"the content of {key}")
        elif key in (*CONTENT_KEYS, "tokenizer"):
            found.append(f"{key} ({'other' if before and after else 'given now' if after else 'not given now'})")
        else:
            found.append(f"{key} {before} -> {after}")
    return found


def is_builtin(config: Config) -> bool:
    """True when the corpus is the built-in one.

    Raises:
        DataError: it is given together with files.
    """
    inputs = config.data.train_inputs()
    if BUILTIN in inputs and len(inputs) > 1:
        raise DataError(f"{BUILTIN} cannot be mixed with files", where="data.train", hint="Name one or the other.")
    return inputs == (BUILTIN,)


def terms_path(name: str) -> Path:
    """The file of terms.

    Raises:
        DataError: it does not exist or is not a file.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        found = "a directory, not a file" if path.is_dir() else "missing"
        raise DataError(f"the list of terms {name} is {found}", hint="Set data.terms to a file with one term per line")
    return path


def _digest(identity: Fingerprint, key: str, paths: Sequence[Path], known: dict[str, dict[str, Any]]) -> str:
    """Digest of the contents of the files in order; each file is recorded in `identity.inputs`."""
    sums = [_note_file(identity, key, path, known)["sha256"] for path in paths]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _note_file(identity: Fingerprint, key: str, path: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = path.resolve()
    status = found.stat()
    entry: dict[str, Any] = {"key": key, "path": str(found), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    before = known.get(entry["path"], {})
    unchanged = all(before.get(name) == entry[name] for name in ("bytes", "mtime_ns"))
    entry["sha256"] = before["sha256"] if unchanged else sha256_of(found)
    identity.inputs.append(entry)
    return entry


def _identify_tokenizer(
    identity: Fingerprint, config: Config, recorded: dict[str, Any] | None, known: dict[str, dict[str, Any]]
) -> None:
    settings = config.tokenizer
    if settings.train_vocab_size is not None:
        identity.values["tokenizer.train_vocab_size"] = settings.train_vocab_size
        identity.values["tokenizer.character_coverage"] = settings.character_coverage
        return
    name = settings.name_or_path or config.model.name_or_path
    if name is None:
        raise DataError("no tokenizer is named", hint="Set tokenizer.name_or_path, or tokenizer.train_vocab_size to train one.")
    setting = "model.name_or_path" if settings.name_or_path is None else "tokenizer.name_or_path"
    entries = [_note_file(identity, "tokenizer", path, known) for path in tokenizer_files(name, setting=setting)]
    recorded = recorded or {}
    before = recorded.get("identity", {}).get("tokenizer")
    if TOKENIZER_RECORD not in recorded:  # a store of an earlier version, which read and recorded one file only
        entries = [entry for entry in entries if entry["path"] in known] or entries
    same_files = len(entries) == len(recorded.get(TOKENIZER_RECORD, entries))
    if before is not None and same_files and all(known.get(entry["path"]) == entry for entry in entries):
        identity.values["tokenizer"] = before
        return
    identity.tokenizer = load_tokenizer(name, setting=setting)
    rows = None if config.model.name_or_path is None else hub.declared_rows(config.model.name_or_path)
    if rows is not None:
        check_rows(identity.tokenizer, rows, str(config.model.name_or_path))
    identity.values["tokenizer"] = identity.tokenizer.fingerprint()
