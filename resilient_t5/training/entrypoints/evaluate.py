"""A trained model examined: restoration figures, their breakdown and the resilience curve, for one run directory.

The model is the run's export, cut again to the rows that it was trained with. It is examined on the documents that the run
held out, or on other text, which is prepared with the run's tokenizer and terms and thrown away again. A token of other text
that the run never trained keeps the row it had before training; how many there are is counted and told.
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
from resilient_t5.data.store.store import Split, Store
from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.load import load_model
from resilient_t5.model.vocabulary import cut_vocabulary
from resilient_t5.restoration.scoring.baselines import MajorityBaseline
from resilient_t5.restoration.scoring.measure import Restorer, measure_restoration
from resilient_t5.restoration.scoring.metrics import BandBy, Glossary, count_terms, term_restoration_by
from resilient_t5.restoration.scoring.resilience import DAMAGES, Curve, measure_curve
from resilient_t5.restoration.scoring.score_report import RestorationReport
from resilient_t5.training.build import batch_sizes
from resilient_t5.training.hardware.device import build_device

FILLER = "A store has two sides; this line is the other one.\n"
BANDS: tuple[BandBy, ...] = ("training", "length", "sentinel", "frequency", "digits")


@dataclass(frozen=True, eq=False)
class Examination:
    """One model with the examples that it is examined on; `open_examination` makes it."""

    name: str
    config: Config
    model: T5Model
    split: Split
    restorer: Restorer
    sizes: dict[str, int]
    foreign_share: float
    """Share of the tokens examined that the run never trained."""

    def batches(self, examples: int, mask_ratio: float, noise_ratio: float) -> list[EvaluationBatch]:
        """The fixed examples under this damage."""
        corruption = dataclasses.replace(
            self.config.corruption, mask_ratio=mask_ratio, mask_ratio_spread=0.0, noise_ratio=noise_ratio
        )
        config = dataclasses.replace(self.config, corruption=corruption)
        table, seed = self.restorer.table, config.run.seed
        return evaluation_batches(self.split, table, config, examples=examples, seed=seed, **self.sizes)

    @torch.no_grad()
    def report(self, examples: int) -> RestorationReport:
        """Restoration under the run's own damage."""
        own = self.config.corruption
        batches = self.batches(examples, own.mask_ratio, own.noise_ratio)
        report = measure_restoration(self.model, [(b.micro_batch, b.corrupted) for b in batches], self.restorer)
        assert report is not None  # nothing can cut it short
        return report

    @torch.no_grad()
    def curves(self, examples: int) -> list[Curve]:
        """The resilience curves; a model that corrects whole texts has no masks, so noise alone."""
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


def open_examination(run: Path, config: Config, which: str, text: Sequence[str], samples: int) -> Examination:
    """Load a run's export and the examples for it.

    Args:
        run: the run directory.
        config: its configuration.
        which: `best` or `last`.
        text: files to examine on; none takes the documents that the run held out.
        samples: restored examples to show.

    Raises:
        DataError: no export or no store there, or text that cannot be used.
    """
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run)))
    export = run / "export" / which
    if not (export / "config.json").is_file():
        raise DataError(f"there is no export in {export}", hint="Let the run come to its end first")
    store = Store.open(store_directory(config))
    device, _, _ = build_device(config)
    model = load_model(str(export), ModelConfig())
    own = Dataset.over(store, config)
    if not text:
        ids, train, split, foreign_share = own.active_to_full, own.train, own.validation, 0.0
    else:
        ids, train, split, foreign_share = _with_other_text(config, store, own, text)
    cut_vocabulary(model, ids)
    table = build_token_table(store.tokenizer, ids, _confusions(config))
    glossary = Glossary(store.terms, count_terms(train.terms, len(store.terms)), lambda found: _decode(store, ids, found))
    restorer = Restorer(
        split=split,
        table=table,
        glossary=glossary,
        majority=MajorityBaseline.fit(train),
        task=config.corruption.task,
        max_target_tokens=config.data.max_target_tokens,
        samples=samples,
    )
    model.to(device).eval()  # type: ignore[arg-type]  # as in build_trained_model
    return Examination(str(run), config, model, split, restorer, batch_sizes(config, device), foreign_share)


def breakdown(report: RestorationReport) -> dict[str, dict[str, dict[str, float]]]:
    """The exact rate by band: {by: {band: {rate, low, high, n}}}; empty bands are left out."""
    return {
        by: {band: dataclasses.asdict(rate) for band, rate in term_restoration_by(report.outcomes, by).items() if rate.n}
        for by in BANDS
    }


def _with_other_text(config: Config, store: Store, own: Dataset, text: Sequence[str]) -> tuple[np.ndarray, Split, Split, float]:
    """The ids of both corpora together, the training split and the other text in them, and the share never trained."""
    with tempfile.TemporaryDirectory() as folder:
        terms = Path(folder, "terms.txt")
        terms.write_text("".join(f"{term}\n" for term in store.terms), encoding="utf-8")
        filler = Path(folder, "filler.txt")
        filler.write_text(FILLER, encoding="utf-8")
        data = dataclasses.replace(
            config.data, train=str(filler), validation=list(text), terms=str(terms) if store.terms else None
        )
        tokenizer = dataclasses.replace(
            config.tokenizer, name_or_path=str(store.directory / "tokenizer"), train_vocab_size=None
        )
        other = prepare(dataclasses.replace(config, data=data, tokenizer=tokenizer), Path(folder, "store"))
        ids = np.union1d(own.active_to_full, other.active_to_full).astype(np.int32)
        split = in_full_ids(other.validation, np.searchsorted(ids, other.active_to_full).astype(np.int32))
        tokens = np.asarray(split.tokens[:])
        split = dataclasses.replace(
            split,
            tokens=tokens,
            offsets=np.array(split.offsets),
            terms=np.array(split.terms),
            documents=np.array(split.documents),
            pairs=np.array(split.pairs),
        )
    train = in_full_ids(store.train, np.searchsorted(ids, store.active_to_full).astype(np.int32))
    trained = np.isin(ids, own.active_to_full)
    return ids, train, split, float(1.0 - trained[tokens].mean())


def _confusions(config: Config) -> Path | None:
    return None if config.corruption.confusions is None else Path(config.corruption.confusions)


def _decode(store: Store, ids: np.ndarray, found: np.ndarray) -> str:
    known = np.asarray(found)[np.asarray(found) < len(ids)]
    return store.tokenizer.decode(ids[known].tolist())


def as_json(examination: Examination, report: RestorationReport, curves: Sequence[Curve]) -> dict[str, Any]:
    """Everything about one model."""
    return {
        "model": examination.name,
        "foreign_token_share": examination.foreign_share,
        **report.as_row(),
        "by": breakdown(report),
        "resilience": [curve.to_json() for curve in curves],
    }
