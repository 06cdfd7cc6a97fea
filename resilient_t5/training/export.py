"""An export: the model with its full vocabulary, its tokenizer, in a directory that transformers loads."""

import os
import shutil
from pathlib import Path

from resilient_t5.model.vocabulary import FullTables, write_back
from resilient_t5.training.run import Run


def export_model(run: Run, original: FullTables, directory: Path) -> None:
    """Write the live weights of `run` to `directory`, whole or not at all; an export that is there is replaced.

    Args:
        original: the vocabulary tables from before training; rows that were not trained are taken from them.

    Raises:
        DiskFull, StorageError: the file system refuses; the former export is still there.
    """
    directory.parent.mkdir(exist_ok=True)
    temporary = directory.with_name(f".tmp-{directory.name}")
    former = directory.with_name(f".trash-{directory.name}")
    for left_over in (temporary, former):
        shutil.rmtree(left_over, ignore_errors=True)
    write_back(run.updater.model, original, run.trained_ids, temporary)
    run.store.tokenizer.save(temporary)
    if directory.exists():
        os.rename(directory, former)
    os.rename(temporary, directory)
    shutil.rmtree(former, ignore_errors=True)
