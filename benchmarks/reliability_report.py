"""Writes RELIABILITY.md from the JSON files in benchmarks/results/; a test holds the committed text against it.

    python benchmarks/reliability_report.py

Of each kind the newest file counts: `*_reliability_*`, `*_crash_*`, `*_killed_run_*`, `*_checkpoint_io_*`. A kind that is
not there, and an attack that was not run, is said to be missing and never filled in.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "RELIABILITY.md"

PROMISE = """# Reliability

What this page says was measured by the commands beside it; `python benchmarks/reliability_report.py` writes it from the
files in `benchmarks/results/`, and a test fails when the two differ.

## What is promised

- A checkpoint stands whole under its name or not at all. Every byte of it is verified when it is loaded; one that fails goes
  into `checkpoints/quarantine/`, and the next older one is loaded. When none is whole the run refuses to start (66) and
  deletes nothing.
- A save that was reported is not lost, whenever the process is killed.
- A run that was interrupted, by a signal or by kill -9, ends on a CPU in the same weights, optimizer state and metric rows,
  bit for bit, as one that was left alone. It redoes at most what came after its newest checkpoint.
- Newest, best and newest healthy checkpoint are never deleted. NaN and infinity are never committed.

What is not promised: the same bits on another machine, another version of torch, or a GPU without `hardware.deterministic`.
Power loss was modelled from recorded calls (R3), not tried with a plug. Network file systems and Windows were not tried.
"""
ATTACKS = ("R1", "R2", "R3", "R4", "R6", "R7", "R9", "R10", "R12", "R13", "R17", "R22")


def newest(kind: str) -> dict[str, Any] | None:
    """The newest result file of a kind, or None."""
    files = sorted(RESULTS.glob(f"*_{kind}_*.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def percent(share: float) -> str:
    """A share with as many places as a small one needs."""
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.0f} %"


def seconds(value: float) -> str:
    """Seconds without a wrong precision."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def machine(result: dict[str, Any]) -> str:
    """Kind of machine and versions in words."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kind = [f"{result['cores']} cores"] if "cores" in result else []
    kind += [f"{result['memory_gib']} GiB"] if "memory_gib" in result else []
    kind += [result["system"]] if isinstance(result.get("system"), str) else []
    return ", ".join([*kind, versions, result["date"]])


def attacks_section() -> str:
    """The table of the project's own attacks."""
    text = "\n## Attacks\n\n"
    found = newest("reliability")
    if found is None:
        return text + "Not run yet: `python benchmarks/reliability.py`.\n"
    rows, commands = [], []
    for name in ATTACKS:
        attack = found["attacks"].get(name)
        if attack is None:
            rows.append([name, "not run", "", "", "", "", ""])
            continue
        # A share below 3/N means something where the trials were drawn at random; a list that was gone through has none.
        bound = percent(3 / attack["trials"]) if "=" in attack["command"] and not attack["failures"] else "-"
        also = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in attack["counts"].items())
        also = attack.get("note", also)
        tried = f"{attack['trials']:,} {attack['unit']}" + (f" ({also})" if also else "")
        rows.append([name, attack["attack"], tried, str(attack["failures"]), bound, attack["goal"], seconds(attack["wall_s"])])
        commands.append(f"{name}: {attack['command']}")
    header = ["", "attack", "tried", "failures", "below, 95 %", "goal", "took"]
    note = f"""
A failure is a failed test; the bound is 3/N for none in N random trials, and `-` where all there is was gone through.
{machine(found)}, with other work on the machine.
`python benchmarks/reliability.py` runs them all; alone:
"""
    return text + table(header, rows) + note + "\n```\n" + "\n".join(commands) + "\n```\n"


def peers_section() -> str:
    """The table of the same attacks on others."""
    text = "\n## The same attacks on other ways to save\n\n"
    found = newest("crash")
    if found is None:
        return text + "Not run yet: `python benchmarks/crash.py`.\n"
    rows = []
    for name, system in found["systems"].items():
        kill = system["kill"]
        cells = [f"{name}: {system['how']}", f"{kill['bad']} of {kill['trials']} ({percent(kill['bad_share'])})"]
        cells += [f"below {percent(kill['bad_share_below_95'])}"]
        for damage in system["damage"].values():
            lost = damage["dies_nothing_older"]
            cells.append(f"{damage['bad']} of {damage['trials']}" + (f", {lost} more lost" if lost else ""))
        rows.append(cells)
    kinds = [kind.replace("_", " ") for kind in next(iter(found["systems"].values()))["damage"]]
    note = """
Kills: SIGKILL at a random moment while the system saves after every update, then its own resume call in a new process. Bad
is a call that raises, a state that is a mixture, or one older than the last save that had returned. The shares are those
of a kill in or near a save: they rank systems and are no failure rates of real runs.

Damage to one file of the newest save: bad is a state that was never saved and is taken for one, or a call that raises
although an older save is whole. "More lost" counts calls that raised with nothing older to fall back to.
"""
    how = f"\n{machine(found)}, files {'in memory' if found['in_memory'] else 'on disk'}. `python benchmarks/crash.py`\n"
    return text + table(["system", "bad kills", "95 %", *kinds], rows) + note + how


def real_run_section() -> str:
    """The whole program on a real text."""
    text = "\n## The real thing\n\n"
    found = newest("killed_run")
    if found is None:
        return text + "Not run yet: `python benchmarks/killed_run.py`.\n"
    compared = ", ".join(key for key in found["compared"])
    verdict = "identical" if found["identical"] else f"DIFFERENT in {', '.join(found['different'])}"
    kills = f"{found['kills']} times at random, {found['kills_in_training']} times while it trained"
    return f"""{text}`bin/train` with `configs/zh-medical-cpu.yaml` on a Chinese medical text
of {found["text_bytes"] / 1e6:.1f} MB, {found["updates"]} updates, killed {kills},
otherwise while it started; {found["kills_in_a_save"]} kills left a half-written save. Each time it was started again.
Beside the same run left alone: **{verdict}**.

Compared: {compared}.
`python benchmarks/killed_run.py`; {machine(found)}.
"""


def cost_section() -> str:
    """What saving costs."""
    text = "\n## What it costs\n\n"
    found = newest("checkpoint_io")
    if found is None:
        return text + "Not run yet: `python benchmarks/checkpoint_io.py`.\n"
    rows = []
    if stall := found.get("stall"):
        size = f"quickstart, {stall['checkpoint_mib']:.1f} MiB, {stall['saves']} saves"
        rows += [
            [f"stall of the loop a save ({size})", f"{stall['stall_ms']:.1f} ms"],
            ["share of training time stalled with a save a minute", percent(stall["stalled_share_at_a_save_a_minute"])],
            ["the same with all CPU seconds of the writing thread", percent(stall["whole_cost_share_at_a_save_a_minute"])],
        ]
    if speed := found.get("speed"):
        size = f"{speed['state_mib']:.0f} MiB"
        rows += [
            [f"stall of the loop a save ({size}, background)", f"{speed['stall_ms']:.0f} ms"],
            ["write, hashed and fsynced", f"{speed['synchronous_write_mib_per_s']:.0f} MiB/s"],
            ["bare write and fsync of as many bytes", f"{speed['bare_write_and_fsync_mib_per_s']:.0f} MiB/s"],
            ["load, every byte verified", f"{speed['verified_load_mib_per_s']:.0f} MiB/s"],
        ]
    for name, memory in (found.get("memory") or {}).items():
        if isinstance(memory, dict):
            peak = f"{memory['resumed_mib']:.0f} over {memory['fresh_mib']:.0f} MiB = {memory['resumed_over_fresh']:.3f}"
            rows.append([f"peak memory of a resumed process over a fresh one ({name.replace('_', ' ')})", peak])
    return text + table(["", ""], rows) + f"\n`python benchmarks/checkpoint_io.py`; {machine(found)}.\n"


def make_report() -> str:
    """The whole page."""
    return PROMISE + attacks_section() + peers_section() + real_run_section() + cost_section()


if __name__ == "__main__":
    REPORT.write_text(make_report(), encoding="utf-8")
