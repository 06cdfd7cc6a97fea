"""What a run begins with, the same in every process: a checkpoint, the weights of another run, or first weights."""

from pathlib import Path

from resilient_t5.checkpoint import rng
from resilient_t5.checkpoint.manager import Loaded
from resilient_t5.checkpoint.reader import load_checkpoint
from resilient_t5.config.schema import Config, mathematics_sha256
from resilient_t5.data.cooccurrence import count_neighbours
from resilient_t5.data.store.store import Split
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.initial_weights import MOST_IDS, RANK, factored, put_first_vectors
from resilient_t5.training.equal import begin_equal
from resilient_t5.training.ranks import Ranks
from resilient_t5.training.saving import Saver
from resilient_t5.training.state import RunState


def begun_together(saver: Saver, loaded: Loaded | None, config: Config, train: Split, ranks: Ranks) -> RunState:
    """The state that the run begins with, the same in every process."""
    state = restored(saver, loaded, config, train)
    same = {**saver.fingerprints, "settings": mathematics_sha256(config), "precision": saver.conditions["precision"]}
    begin_equal(ranks, saver.updater.model, same, is_new=loaded is None)
    return state


def restored(saver: Saver, loaded: Loaded | None, config: Config, train: Split) -> RunState:
    """The state of `loaded` put into the parts; or that of a new run, with the weights it forks from or begins with."""
    if loaded is not None:
        return saver.restore(loaded)
    if config.run.fork is not None:
        saver.take_weights(load_checkpoint(Path(config.run.fork)))
    elif config.model.name_or_path is None:
        place_vocabulary(saver.updater.model, train, config.run.seed)
    rng.start(config.run.seed)
    return RunState()


def place_vocabulary(model: T5Model, train: Split, seed: int) -> None:
    """Give the frequent pieces of a model from scratch the vectors that their neighbours in the training text suggest."""
    rows, width = model.shared.weight.shape
    found = count_neighbours(train, rows, MOST_IDS)
    vectors_nR = factored(found.row_ends, found.columns, found.values, min(RANK, width), seed)
    put_first_vectors(model, found.ids, vectors_nR, seed)
