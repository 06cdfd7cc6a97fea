"""Evaluate the export of a run: restoration metrics, their breakdown and the resilience curves.

The exported model is reduced to the vocabulary rows of the evaluated text. The text is the run's held-out documents, or
other text, which is prepared temporarily with the run's tokenizer and terms. Tokens of other text that the run did not train
have their pretrained embeddings; their share is reported.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resilient_t5.config.schema import Config, ModelConfig
from resilient_t5.data.batches import EvaluationBatch, evaluation_batches
from resilient_t5.data.corruption.token_table import build_token_table
from resilient_t5.data.dataset import Dataset, in_full_ids
from resilient_t5.data.store.prepare import prepare, store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.load import load_model
from resilient_t5.model.vocabulary import cut_vocabulary
from resilient_t5.restoration.scoring.measure import RestorationReport, Restorer, measure_restoration
from resilient_t5.restoration.scoring.metrics import BandBy, term_restoration_by
from resilient_t5.restoration.scoring.resilience import DAMAGES, Curve, measure_curve
from resilient_t5.training.build import batch_sizes, build_restorer
from resilient_t5.training.hardware.device import build_device

TRAIN_PLACEHOLDER = "A store needs training text; this line is never used.\n"
BANDS: tuple[BandBy, ...] = ("training", "length", "sentinel", "frequency", "digits")


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model and its evaluation examples; `open_model` creates it."""

    name: str
    config: Config
    model: T5Model
    restorer: Restorer
    sizes: dict[str, int]
    foreign_share: float
    """Share of the evaluated tokens that the run did not train."""

    def batches(self, examples: int, mask_ratio: float, noise_ratio: float) -> list[EvaluationBatch]:
        """The evaluation examples with this corruption."""
        corruption = dataclasses.replace(
            self.config.corruption, mask_ratio=mask_ratio, mask_ratio_spread=0.0, noise_ratio=noise_ratio
        )
        config = dataclasses.replace(self.config, corruption=corruption)
        table, seed = self.restorer.table, config.run.seed
        return evaluation_batches(self.restorer.split, table, config, examples=examples, seed=seed, **self.sizes)

    @torch.no_grad()
    def report(self, examples: int) -> RestorationReport:
        """Restoration metrics with the corruption of the run."""
        own = self.config.corruption
        return measure_restoration(self.model, self.batches(examples, own.mask_ratio, own.noise_ratio), self.restorer)

    @torch.no_grad()
    def curves(self, examples: int) -> list[Curve]:
        """Resilience curves; for a model that corrects whole texts, which has no masks, noise only."""
        own = self.config.corruption
        damages = DAMAGES if own.task == "restore" else ("noise",)
        return [
            measure_curve(
                damage,
                self.model,
                lambda masks, noise: self.batches(examples, masks, noise),
                self.restorer,
                own.mask_ratio,
            )
            for damage in damages
        ]


def open_model(config: Config, which: str, text: Sequence[str], samples: int) -> EvaluatedModel:
    """Load a run's export and its evaluation examples.

    Args:
        config: configuration of the run.
        which: `best` or `last`.
        text: files to evaluate on; empty: the held-out documents of the run.
        samples: number of restored examples in the report.

    Raises:
        DataError: the export or the store is missing, or the text is unusable.
    """
    export = Path(config.run.dir) / "export" / which
    if not (export / "config.json").is_file():
        raise DataError(f"there is no export in {export}", hint="Let the run finish, or write it with bin/export")
    store = Store.open(store_directory(config))
    device, _, _ = build_device(config)
    model = load_model(str(export), ModelConfig())
    corpus, foreign_share = Dataset.over(store, config), 0.0
    if text:
        corpus, foreign_share = _with_other_text(config, corpus, text)
    cut_vocabulary(model, corpus.active_to_full)
    restorer = build_restorer(config, corpus, samples)
    model.to(device).eval()  # type: ignore[arg-type]  # as in build_trained_model
    return EvaluatedModel(config.run.dir, config, model, restorer, batch_sizes(config, device), foreign_share)


def _with_other_text(config: Config, own: Dataset, text: Sequence[str]) -> tuple[Dataset, float]:
    """The other text as validation split, in the union of the ids of both corpora, and its share of untrained tokens."""
    store = own.store
    with tempfile.TemporaryDirectory() as folder:
        terms = Path(folder, "terms.txt")
        terms.write_text("".join(f"{term}\n" for term in store.terms), encoding="utf-8")
        placeholder = Path(folder, "filler.txt")
        placeholder.write_text(TRAIN_PLACEHOLDER, encoding="utf-8")
        data = dataclasses.replace(
            config.data, train=str(placeholder), validation=list(text), terms=str(terms) if store.terms else None
        )
        tokenizer = dataclasses.replace(
            config.tokenizer, name_or_path=str(store.directory / "tokenizer"), train_vocab_size=None
        )
        other = prepare(dataclasses.replace(config, data=data, tokenizer=tokenizer), Path(folder, "store"))
        ids = np.union1d(own.active_to_full, other.active_to_full).astype(np.int32)
        split = in_full_ids(other.validation, np.searchsorted(ids, other.active_to_full).astype(np.int32))
        tokens = np.asarray(split.tokens[:])
        copies = {name: np.array(getattr(split, name)) for name in ("offsets", "terms", "documents", "pairs")}
        split = dataclasses.replace(split, tokens=tokens, **copies)  # independent of the temporary files
    train = in_full_ids(store.train, np.searchsorted(ids, store.active_to_full).astype(np.int32))
    trained = np.isin(ids, own.active_to_full)
    confusions = None if config.corruption.confusions is None else Path(config.corruption.confusions)
    table = build_token_table(store.tokenizer, ids, confusions)
    return Dataset(store, train, split, ids, table), float(1.0 - trained[tokens].mean())


def as_json(model: EvaluatedModel, report: RestorationReport, curves: Sequence[Curve]) -> dict[str, Any]:
    """All results of one model as JSON values; `by` has the exact rate of every non-empty band."""
    by = {
        name: {band: dataclasses.asdict(rate) for band, rate in term_restoration_by(report.outcomes, name).items() if rate.n}
        for name in BANDS
    }
    return {
        "model": model.name,
        "foreign_token_share": model.foreign_share,
        **report.as_row(),
        "by": by,
        "resilience": [curve.to_json() for curve in curves],
    }
