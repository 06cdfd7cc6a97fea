"""TensorBoard, drawn from the rows of metrics.jsonl; the x axis is the update everywhere.

Three things about TensorBoard shape this file. Its Python loader ignores the first purge mark of a run, so even the first
writer sets one, else curves overlap after a crash (tensorboard #3732). `add_hparams` and `add_scalars` make runs of their
own that are never purged (pytorch #32651, #42379), so hyper-parameters are written as three summaries of this run, and
curves are put together by the layout of the custom scalars tab. Losses also stand in the default tab, where most people stay.
"""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from resilient_t5.restoration.scoring.resilience import Curve

GROUPS = {
    "train": ("train", "performance"),
    "evaluation": ("evaluation", "performance"),
    "restoration": ("restoration", "performance"),
    "resilience": ("resilience", "performance"),
    "save": ("checkpoint", "checkpoint"),
    "guard": ("guard", "guard"),
}
"""TensorBoard group of a row's values: those that depend on the run, those that depend on the machine."""

NOT_DRAWN = ("kind", "update", "time", "q", "metric")
"""What is no curve of its own: how a row is found, the number of a checkpoint, and the loss that stands elsewhere."""
MACHINE_ENDINGS = ("_s", "_per_s", "_mib", "_wait_share", "_gib")
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")
CONVERGENCE_PREFIX = "convergence_"
LAYOUT = {
    "Loss": {
        "loss": ["Multiline", ["train/loss", "evaluation/loss$", "evaluation/best$"]],
        "masked terms and the rest": ["Multiline", ["evaluation/loss_terms", "evaluation/loss_rest"]],
        "right tokens": ["Multiline", ["evaluation/token_accuracy", "evaluation/term_token_accuracy"]],
    },
    "Saturation": {
        "projected gain": ["Margin", ["convergence/gain", "convergence/gain_low", "convergence/gain_high"]],
        "patience": ["Multiline", ["convergence/plateau", "convergence/patience"]],
        "phase": ["Multiline", ["convergence/phase"]],
    },
    "Restoration": {
        "term restoration": ["Margin", ["restoration/term_rate", "restoration/term_rate_low", "restoration/term_rate_high"]],
        "beside the baselines": [
            "Multiline",
            ["restoration/term_rate$", "restoration/majority_rate", "restoration/copy_rate"],
        ],
        "by sentinel": ["Multiline", ["restoration/term_rate_sentinel_.*"]],
    },
    "Machine": {"memory": ["Multiline", ["performance/memory_mib"]], "speed": ["Multiline", ["performance/tokens_per_s"]]},
}


class TensorBoardWriter:
    """The event files of one run, opened with the update that the run goes on from (0 for a new one)."""

    def __init__(self, directory: Path, *, from_update: int):
        _wait_for_a_later_second(directory)
        self._writer = SummaryWriter(str(directory), purge_step=0 if from_update == 0 else from_update + 1)
        if from_update == 0:
            self._writer.add_custom_scalars(LAYOUT)

    def draw(self, row: Mapping[str, Any]) -> None:
        """The numbers of one row as scalars; words and lists are left out."""
        groups = GROUPS.get(row["kind"])
        if groups is None:
            return
        for name, value in row.items():
            if name in NOT_DRAWN or isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
                continue
            if name.startswith(CONVERGENCE_PREFIX):
                tag = f"convergence/{name.removeprefix(CONVERGENCE_PREFIX)}"
            else:
                tag = f"{groups[1] if name.endswith(MACHINE_ENDINGS) else groups[0]}/{name}"
            self._writer.add_scalar(tag, value, row["update"])

    def text(self, tag: str, markdown: str, update: int) -> None:
        """A text, in Markdown."""
        self._writer.add_text(tag, markdown, update)

    def picture(self, tag: str, path: Path, update: int) -> None:
        """A PNG file as an image."""
        with Image.open(path) as image:
            self._writer.add_image(tag, np.asarray(image.convert("RGB")), update, dataformats="HWC")

    def outcome(self, settings: Mapping[str, bool | int | float | str], finals: Mapping[str, float], update: int) -> None:
        """The hyper-parameters and the final figures of the run, in this run and no other."""
        for summary in hparams(dict(settings), dict.fromkeys(finals, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in finals.items():
            self._writer.add_scalar(name, value, update)

    def flush(self) -> None:
        """Push everything to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def draw_resilience_board(directory: Path, curves: Sequence[Curve], picture: Path) -> None:
    """The resilience curves as curves over the damage in percent, their areas, and their picture.

    Args:
        directory: a run of its own in TensorBoard, since the x axis is no update here.
        curves: of one model.
        picture: the PNG that was drawn of them.
    """
    _wait_for_a_later_second(directory)
    with SummaryWriter(str(directory), purge_step=0) as writer:
        for curve in curves:
            for point in curve.points:
                if point.rate.n:
                    writer.add_scalar(f"resilience/term_rate_{curve.damage}", point.rate.rate, round(100 * point.level))
            writer.add_scalar(f"resilience/area_{curve.damage}", curve.area, 0)
        with Image.open(picture) as image:
            writer.add_image("resilience/curve", np.asarray(image.convert("RGB")), 0, dataformats="HWC")


def _wait_for_a_later_second(directory: Path) -> None:
    """TensorBoard reads event files in the order of their names, which hold whole seconds: at most one second is waited."""
    former = [int(found[1]) for path in directory.glob("events.*") if (found := EVENT_FILE.match(path.name))]
    while former and 0 <= max(former) - time.time() + 1 <= 1:
        time.sleep(0.02)
