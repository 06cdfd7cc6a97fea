"""A published tokenizer directory -> the `tokenizer.json` document for training and export.

The reference is AutoTokenizer: for any files in the directory (`tokenizer.json`, a single `spiece.model`, additional files of
the slow tokenizer), the ids of a text are those of `AutoTokenizer.from_pretrained`.

There is one difference. T5's tokenizers match `<extra_id_k>` anywhere in a text, as an added token. mT5's do not: there the
sentinels are ordinary pieces that begin with U+2581, and "Dose:<extra_id_0>," is encoded letter by letter. The document for mT5
has the same pieces under their plain names, as added tokens with the same ids. All other ids are unchanged, which is checked on
probe texts. The tokens after a gap then depend on the tokenizer:

    T5    a gap ends a word:  "hyper<extra_id_0>sion"  ->  "U+2581 hyper", sentinel, "U+2581 s", "ion"
    mT5   it does not:        "hyper<extra_id_0>sion"  ->  "U+2581 hyper", sentinel, "s", "ion"    (as its own tokenizer does
          after " <extra_id_0>", and as in its pre-training)
"""

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from resilient_t5 import hub
from resilient_t5.data.tokenizer.sentencepiece import (
    SENTINEL_PIECE,
    SPACE,
    TRAILING_SPACES,
    added_token,
    parse_sentencepiece,
    plain_sentinel_names,
)
from resilient_t5.errors import DataError

CONFIG_FILE = "tokenizer_config.json"
MAX_EXTRA_IDS = 10_000
MAX_CAUSE_CHARACTERS = 200
DOCUMENT_FILE = "tokenizer.json"
SPIECE_FILE = "spiece.model"
ADDED_TOKENS_FILE = "added_tokens.json"
LITERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NEVER_READ = ("<pad>", "</s>", "<unk>")  # never read from text
# White space of Unicode, at which WhitespaceSplit ends a word.
WHITE_SPACE = r"[\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
PROBES = (
    "Hb 13.2 g/dL, HbA1c: 7 %.",
    " two  spaces \tand\u00a0a tab\r\nand lines\n\n",
    "\u8bca\u65ad\uff1a2\u578b\u7cd6\u5c3f\u75c5\u3002\u5904\u65b9 \uff1b\u7597\u7a0b\uff1a\u51713\u4e2a\u6708\u3002",
    "\u3000\u5168\u89d2 \uff21\uff22\uff11 \u6771\u4eac\u3067\u3001\ufb01ne e\u0301 \u2460",
    "a\u2581b \u2581c x\u200by \ufeffz",
    "<tag> & {brace} [box] 50% \u00b5g/m\u00b2 \U0001f600",
    "word",
    " ",
    "",
)


def read_published(directory: Path) -> dict[str, Any]:
    """Read the document of the tokenizer in `directory`.

    Raises:
        DataError: no tokenizer, one that T5 and mT5 do not use, or one that cannot be read.
    """
    hub.refuse_unsupported(directory)
    _check_files(directory)
    _check_settings(directory)
    literal = _literal_document(directory)
    if literal is not None:
        return _without_space_before_gaps(literal)
    tokenizer = _auto_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    if backend is None or document["model"].get("type") != "Unigram":
        why = "not a unigram tokenizer, the kind of T5 and mT5"
        if backend is None:
            why = "written in Python; only unigram tokenizers of the tokenizers library are supported"
        raise DataError(
            f"its tokenizer ({type(tokenizer).__name__}) is {why}",
            where=str(directory),
            hint="Name a T5 or mT5 with spiece.model or tokenizer.json",
        )
    document |= {"truncation": None, "padding": None}
    document["added_tokens"] = list({int(token["id"]): token for token in document["added_tokens"]}.values())
    return _without_space_before_gaps(_with_sentinels_in_running_text(document, directory))


def _check_files(directory: Path) -> None:
    """Refuse damaged files with clear messages, before AutoTokenizer reads them."""
    if (directory / DOCUMENT_FILE).is_file():
        model = hub.read_json(directory / DOCUMENT_FILE).get("model")
        if not isinstance(model, dict) or model.get("type") != "Unigram":
            raise DataError(
                "this is not a unigram tokenizer, the kind of T5 and mT5",
                where=str(directory / DOCUMENT_FILE),
                hint="Name the tokenizer of a T5 or mT5",
            )
    elif (directory / SPIECE_FILE).is_file():
        parse_sentencepiece((directory / SPIECE_FILE).read_bytes(), str(directory / SPIECE_FILE))


def _check_settings(directory: Path) -> None:
    """Refuse settings that T5 does not use, before AutoTokenizer applies them."""
    path = directory / CONFIG_FILE
    config = hub.read_json(path) if path.is_file() else {}
    extra = config.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= MAX_EXTRA_IDS:
        raise DataError(f"extra_ids is {extra!r}, not from 0 to {MAX_EXTRA_IDS:,}", where=str(path), hint="Correct it")
    for key, expected in (("eos_token", "</s>"), ("pad_token", "<pad>")):
        found = config.get(key) or expected
        found = found.get("content") if isinstance(found, dict) else found
        if found != expected:
            raise DataError(f"its {key} is {found!r}, and T5's is {expected!r}", where=str(path), hint="Name a T5 or mT5")


def _literal_document(directory: Path) -> dict[str, Any] | None:
    """`tokenizer.json` as it is, where AutoTokenizer also uses it as it is, or where it is the only file.

    Our exports are in this form.
    """
    if not (directory / DOCUMENT_FILE).is_file() or (directory / ADDED_TOKENS_FILE).is_file():
        return None
    document = hub.read_json(directory / DOCUMENT_FILE)
    if not any((directory / name).is_file() for name in (CONFIG_FILE, hub.CONFIG_FILE)):
        return document
    config = hub.read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    if config.get("tokenizer_class") not in LITERAL_CLASSES or config.get("added_tokens_decoder"):
        return None
    added = {token.get("content") for token in document.get("added_tokens") or [] if isinstance(token, dict)}
    named = config.get("additional_special_tokens") or []
    return document if isinstance(named, list) and all(name in added for name in named) else None


def _auto_tokenizer(directory: Path) -> Any:
    # Imported here: it takes seconds, and our own exports do not need it.
    from transformers import AutoTokenizer, T5Tokenizer

    # Without a model_type in config.json, AutoTokenizer cannot choose the class.
    config = hub.read_json(directory / hub.CONFIG_FILE) if (directory / hub.CONFIG_FILE).is_file() else {}
    alone = "model_type" not in config and not (directory / CONFIG_FILE).is_file() and (directory / SPIECE_FILE).is_file()
    reader = T5Tokenizer if alone else AutoTokenizer
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return reader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  many types, among them bare Exception of the backend
        cause = " ".join(str(error).split())[:MAX_CAUSE_CHARACTERS] or type(error).__name__
        raise DataError(
            f"{reader.__name__} of transformers cannot read this tokenizer: {cause}",
            where=str(directory),
            hint="Check its tokenizer_config.json, or fetch its files again",
        ) from error
    finally:
        logger.setLevel(level)


def _with_sentinels_in_running_text(document: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The document with its sentinels as added tokens on the ids that the model was trained with."""
    vocabulary = [(str(piece), float(score)) for piece, score in document["model"]["vocab"]]
    added = document["added_tokens"]
    if not any(SENTINEL_PIECE.fullmatch(piece) and piece.startswith(SPACE) for piece, _ in vocabulary):
        found = {token["content"] for token in added}
        if all(piece in found for piece, _ in vocabulary if SENTINEL_PIECE.fullmatch(piece)):
            return document  # T5: its sentinels are added tokens; or there are none, which the caller refuses
    else:  # without its tokenizer_config.json an mT5 gets a second set of sentinels, beyond the rows of the model
        vocabulary = _without_second_sentinels(vocabulary)
    renamed, pieces = plain_sentinel_names(vocabulary)
    ids = {piece: number for number, (piece, _) in enumerate(renamed)}
    kept = [token for token in added if SENTINEL_PIECE.fullmatch(token["content"]) is None]
    kept += [added_token(ids[name], name, special=True) for name in pieces]
    kept.sort(key=lambda token: int(token["id"]))
    beyond = [int(token["id"]) for token in kept if int(token["id"]) >= len(vocabulary)]
    if beyond != list(range(len(vocabulary), len(vocabulary) + len(beyond))):
        raise DataError(
            "its added tokens come after a second set of sentinels that the model does not have",
            where=str(directory),
            hint='Put a tokenizer_config.json with "extra_ids": 0 there',
        )
    plain = {**document, "added_tokens": kept, "model": {**document["model"], "vocab": [list(entry) for entry in renamed]}}
    joined = _with_joined_gaps(plain)
    return joined if joined is not None and _same_ids(plain, joined) else plain


def _without_space_before_gaps(document: dict[str, Any]) -> dict[str, Any]:
    """The document with sentinels that strip the white space before them, where the tokenizer would keep it.

    Tokenizers of the tokenizers library may give "dose <extra_id_0>" and "dose<extra_id_0>" different ids. Masked tokens
    include the space before them, so training sees only the second form; the export encodes both like the second.
    """
    try:
        backend = Tokenizer.from_str(json.dumps(document))
    except Exception:  # noqa: BLE001  the backend raises bare Exception; building the tokenizer reports it
        return document
    added = document.get("added_tokens") or []
    sentinels = [token for token in added if SENTINEL_PIECE.fullmatch(token["content"])]
    if not sentinels or backend.encode("a <extra_id_0>").ids == backend.encode("a<extra_id_0>").ids:
        return document
    changed = [{**token, "lstrip": True} if token in sentinels else token for token in added]
    return {**document, "added_tokens": changed}


def _without_second_sentinels(vocabulary: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The vocabulary without the sentinels with plain names at its end."""
    last = len(vocabulary)
    while last and SENTINEL_PIECE.fullmatch(vocabulary[last - 1][0]) and not vocabulary[last - 1][0].startswith(SPACE):
        last -= 1
    return vocabulary[:last]


def _with_joined_gaps(document: dict[str, Any]) -> dict[str, Any] | None:
    """The document with word starts at the beginning of the text and after white space only, not after added tokens.

    None where the pre-tokenizer is not one of T5's.
    """
    steps = document["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds not in (["WhitespaceSplit", "Metaspace"], ["Metaspace"]) or steps[-1].get("prepend_scheme") != "always":
        return None
    own = document["normalizer"]
    parts = [] if own is None else own["normalizers"] if own.get("type") == "Sequence" else [own]
    if kinds[0] == "WhitespaceSplit":
        parts = [*parts, _replace(WHITE_SPACE, " ")]
    metaspace = {**steps[-1], "prepend_scheme": "first", "split": True}
    normalizer = {"type": "Sequence", "normalizers": [*parts, _replace(TRAILING_SPACES, "")]}
    return {**document, "normalizer": normalizer, "pre_tokenizer": metaspace}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _same_ids(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two documents give the same ids for the probe texts, and for texts with the added tokens of the first."""
    one, other = (Tokenizer.from_str(json.dumps(document)) for document in (first, second))
    spaced = [f"{probe} {tail}" for probe in PROBES for tail in PROBES[:3]]
    names = [token["content"] for token in first["added_tokens"] if SENTINEL_PIECE.fullmatch(token["content"]) is None]
    added = [f"a{space}{name}{space}b" for name in names if name not in NEVER_READ for space in ("", " ")]
    return all(one.encode(text).ids == other.encode(text).ids for text in (*PROBES, *spaced, *added))
