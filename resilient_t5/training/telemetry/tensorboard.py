"""TensorBoard event files, written from the rows of metrics.jsonl; the x axis is the update.

The Python loader of TensorBoard ignores the first purge mark of a run, so the first writer sets one too; otherwise curves
overlap after a crash (tensorboard #3732). `add_hparams` and `add_scalars` create extra runs that are never purged
(pytorch #32651, #42379), so hyper-parameters are written as summaries of this run, and curves are combined by a layout.
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
"""{kind of row: (tag prefix of its values, tag prefix of its machine-dependent values)}."""

NOT_DRAWN = ("kind", "update", "time", "q", "metric")
"""Row fields that are not drawn as scalars."""
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
        "against the baselines": [
            "Multiline",
            ["restoration/term_rate$", "restoration/majority_rate", "restoration/copy_rate"],
        ],
        "by sentinel": ["Multiline", ["restoration/term_rate_sentinel_.*"]],
    },
    "Machine": {"memory": ["Multiline", ["performance/memory_mib"]], "speed": ["Multiline", ["performance/tokens_per_s"]]},
}


class TensorBoardWriter:
    """The event files of one run that starts or resumes at `from_update`."""

    def __init__(self, directory: Path, *, from_update: int):
        _wait_for_a_later_second(directory)
        self._writer = SummaryWriter(str(directory), purge_step=0 if from_update == 0 else from_update + 1)
        if from_update == 0:
            self._writer.add_custom_scalars(LAYOUT)

    def row(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of one row as scalars."""
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
        """Write a Markdown text."""
        self._writer.add_text(tag, markdown, update)

    def picture(self, tag: str, path: Path, update: int) -> None:
        """Write a PNG file as an image."""
        with Image.open(path) as image:
            self._writer.add_image(tag, np.asarray(image.convert("RGB")), update, dataformats="HWC")

    def outcome(self, settings: Mapping[str, Any], finals: Mapping[str, float | None], update: int) -> None:
        """Write hyper-parameters and final metrics; None is left out."""
        hyper = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
        metrics = {name: value for name, value in finals.items() if value is not None}
        for summary in hparams(hyper, dict.fromkeys(metrics, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, update)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def draw_resilience_board(directory: Path, curves: Sequence[Curve], picture: Path) -> None:
    """Write resilience curves of one model as scalars over the damage in percent, with their areas and their picture.

    Args:
        directory: a separate TensorBoard run, because the x axis is not the update.
        curves: the curves.
        picture: PNG of the curves.
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
    """Wait up to 1 s, because TensorBoard sorts event files by name, and names hold whole seconds."""
    former = [int(match[1]) for path in directory.glob("events.*") if (match := EVENT_FILE.match(path.name))]
    while former and 0 <= max(former) - time.time() + 1 <= 1:
        time.sleep(0.02)
