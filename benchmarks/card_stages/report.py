"""The table, the picture and the closing lines of `bin/benchmark card`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.card_stages.speed import COMPILED, EAGER, NO_GRAPHS, OURS
from resilient_t5.training.telemetry.plots import BEST, new_figure

PEER = "#96b2d4"
MORE, LESS = "more is better", "less is better"
TICKS = (0.2, 0.3, 0.5, 2, 3, 5)


class Line(NamedTuple):
    """One comparison: what, the unit, the figure of each side (None: none), and what is better (None: no ratio)."""

    what: str
    unit: str
    trainer: float | None
    ours: float | None
    better: str | None = MORE

    @property
    def ratio(self) -> float | None:
        """How many times better ours is; below 1 it is worse."""
        if not self.trainer or not self.ours or self.better is None:
            return None
        return self.ours / self.trainer if self.better == MORE else self.trainer / self.ours


def lines_of(result: dict[str, Any]) -> list[Line]:
    """The comparisons that were measured."""
    stages = result["stages"]
    lines: list[Line] = []
    for model in ("mt5-small", "mt5-base"):
        lines += _speed_lines(model, stages.get(model, {}))
        lines += _kernel_lines(model, stages.get(f"{model}-kernels", {}))
    lines += _long_lines(stages.get("long-texts", {}))
    capped = stages.get("memory-cap", {})
    if "ours" in capped:
        ours, trainer = capped["ours"], capped.get("trainer", {})
        what = f"mt5-base within {capped['memory_gib']:g} GiB"
        lines.append(Line(what, "examples/s", trainer.get("examples_per_s"), ours.get("examples_per_s")))
    small = stages.get("small-card", {})
    if small.get("sides"):
        what = f"mt5-small, {small['multiprocessors']} SMs, {small['memory_gib']:g} GiB"
        lines.append(Line(what, "examples/s", _of(small, EAGER, "examples_per_s"), _of(small, OURS, "examples_per_s")))
    if stages.get("quickstart", {}).get("exit_code") == 0:
        lines.append(Line("quickstart", "s", None, stages["quickstart"]["command_s"], None))
    if "tokens_per_s" in (scratch := stages.get("from-scratch", {})):
        what = f"T5 of {scratch['parameters'] / 1e6:.3g} M from scratch"
        lines.append(Line(what, "tokens/s", None, scratch["tokens_per_s"]))
    return lines


def _of(stage: dict[str, Any], side: str, key: str) -> float | None:
    value: float | None = stage.get("sides", {}).get(side, {}).get(key)
    return value


def _speed_lines(model: str, stage: dict[str, Any]) -> Iterator[Line]:
    if not stage.get("sides"):
        return
    ours = _of(stage, OURS, "examples_per_s")
    yield Line(f"{model}, short texts", "examples/s", _of(stage, EAGER, "examples_per_s"), ours)
    if COMPILED in stage["sides"]:
        yield Line("  Trainer with torch_compile", "examples/s", _of(stage, COMPILED, "examples_per_s"), ours)
        yield Line("  warm-up", "s", _of(stage, COMPILED, "warm_s"), _of(stage, OURS, "warm_s"), None)
    if NO_GRAPHS in stage["sides"]:
        yield Line("  ours without CUDA graphs", "examples/s", None, _of(stage, NO_GRAPHS, "examples_per_s"))
    yield Line("  peak memory", "MiB", _of(stage, EAGER, "peak_mib"), _of(stage, OURS, "peak_mib"), LESS)


def _kernel_lines(model: str, stage: dict[str, Any]) -> Iterator[Line]:
    for what, unit, key, better in (
        (f"{model}, kernels of an update", "", "kernels_per_update", LESS),
        (f"{model}, aten calls of an update", "", "calls_per_update", LESS),
        ("  launches of an update", "", "launches_per_update", LESS),
        ("  device busy", "% of time", "busy_share", None),
        ("  peak of the allocator", "MiB", "allocated_peak_mib", LESS),
    ):
        trainer, ours = (_of(stage, side, key) for side in (EAGER, OURS))
        scale = 100 if key == "busy_share" else 1
        if trainer is not None or ours is not None:
            yield Line(what, unit, trainer and scale * trainer, ours and scale * ours, better)


def _long_lines(stage: dict[str, Any]) -> Iterator[Line]:
    if not stage.get("sides"):
        return
    trainer, ours = (_of(stage, side, "tokens_per_s") for side in (EAGER, OURS))
    tokens = next(iter(stage["sides"].values()))
    what = f"mt5-small, {tokens['source_tokens_per_example']:.0f}+{tokens['target_tokens_per_example']:.0f} tokens"
    yield Line(what, "tokens/s", trainer, ours)
    trainer, ours = (_of(stage, side, "needed_share") for side in (EAGER, OURS))
    if trainer or ours:
        yield Line("  share of the measured products", "%", trainer and 100 * trainer, ours and 100 * ours)


def table(result: dict[str, Any]) -> list[str]:
    """The device, the comparisons, and what is missing."""
    stages = result["stages"]
    lines = ["", result.get("device", "unknown device")]
    if "device" in (ceilings := stages.get("ceilings", {})):
        products = ", ".join(
            f"{name} {ceilings[f'{name}_tflops']:g}" for name in ("bf16", "fp16", "fp32") if f"{name}_tflops" in ceilings
        )
        graph = f", {ceilings['graph_kernel_us']:g} us in a CUDA graph" if "graph_kernel_us" in ceilings else ""
        lines += [
            f"measured: {products} TFLOP/s, {ceilings['bandwidth_gb_per_s']:g} GB/s, "
            f"{ceilings['small_operation_us']:g} us for a small operation{graph}",
            "",
        ]
    lines.append(f"{'':<36}{'':<12}{'Trainer':>11}{'ours':>11}{'ratio':>9}")
    for line in lines_of(result):
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}x"
        lines.append(f"{line.what:<36}{line.unit:<12}{_shown(line.trainer):>11}{_shown(line.ours):>11}{ratio:>9}")
    lines += ["ratio: above 1 ours is better. Trainer: a tuned Seq2SeqTrainer.", *_plan_lines(stages)]
    if "identical" in (resume := stages.get("resume", {})):
        equal = "equal bit for bit" if resume["identical"] else f"DIFFERENT: {', '.join(resume['different'])}"
        price = resume.get("deterministic_price", {}).get("ratio")
        shown = f"; deterministic kernels take {price:g} times as long" if price else ""
        lines.append(f"killed at update {resume['killed_at_update']} and resumed: {equal}{shown}")
    for name, stage in stages.items():
        reasons = {"": stage["reason"]} if stage.get("reason") else {}
        reasons |= stage.get("skipped_sides", {}) | stage.get("failed_sides", {})
        lines += [f"not measured: {' '.join(filter(None, (name, side)))}: {reason}" for side, reason in reasons.items()]
    return lines


def _plan_lines(stages: dict[str, Any]) -> Iterator[str]:
    """The planned peaks and those of the allocator, for the longest examples."""
    found = [(model, stages.get(f"{model}-kernels", {}).get("sides", {}).get(OURS, {})) for model in ("mt5-small", "mt5-base")]
    capped = stages.get("memory-cap", {})
    found.append((f"mt5-base within {capped.get('memory_gib')} GiB", capped.get("ours", {})))
    for what, figures in found:
        if "planned_over_measured" in figures:
            planned, measured = figures["planned_peak_mib"], figures["longest_peak_mib"]
            what = figures.get("plan_case", what)
            yield (
                f"memory plan of {what}, longest examples: {planned:,.0f} MiB planned, {measured:,.0f} MiB measured "
                f"({100 * (planned / measured - 1):+.1f} %)"
            )


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw every comparison that has both sides: how many times better ours is.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = [line for line in lines_of(result) if line.ratio is not None]
    if not lines:
        return
    named, head = [], ""
    for line in lines:
        head = line.what.partition(",")[0] if not line.what.startswith(" ") else head
        named.append(f"{head}: {line.what.strip()}" if line.what.startswith(" ") else line.what)
    ratios = [line.ratio or 1.0 for line in lines]
    with new_figure(12, 1.4 + 0.4 * len(lines), path) as figure:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        kind = "; tiny model, only a test" if result["sizes"] == "quick" else ""
        figure.suptitle(f"resilient_t5 compared with a tuned Seq2SeqTrainer: {result['device']}{kind}", x=0.01, ha="left")
        axes = figure.subplots()
        axes.barh(named, [ratio - 1 for ratio in ratios], left=1, color=[BEST if ratio >= 1 else PEER for ratio in ratios])
        for row, (ratio, line) in enumerate(zip(ratios, lines, strict=True)):
            text = f"{ratio:.2f}x  ({_shown(line.ours)} / {_shown(line.trainer)}{line.unit and ' '}{line.unit})"
            axes.text(1.01, row, text, va="center", transform=axes.get_yaxis_transform())
        axes.axvline(1.0, color="#5a5a5a", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(min(*ratios, 0.5) / 1.1, max(*ratios, 2.0) * 1.1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if value in TICKS else "")
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.set_xlabel(f"times better than the Trainer (ours / Trainer on the right); {versions}", fontsize=9)
