"""Write RELIABILITY.md from the JSON files in benchmarks/results/; a test compares the committed page with the output.

    python benchmarks/reliability_report.py

The newest file of each kind is used: `*_reliability_*`, `*_crash_*`, `*_killed_run_*`, `*_checkpoint_io_*`. A missing kind
is reported as "Not run yet", a missing attack as "not run".
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "RELIABILITY.md"

PROMISE = """# Reliability

This page lists the guarantees of the package and the measurements that support them. `python benchmarks/reliability_report.py`
generates it from the files in `benchmarks/results/`, and a test fails when the page and the files differ.

## Guarantees

- A checkpoint directory is complete or absent. Every byte is verified when a checkpoint is loaded. A checkpoint that fails
  verification is moved to `checkpoints/quarantine/`, and the next older one is loaded. If no checkpoint is intact, the run
  refuses to start (exit code 66) and deletes nothing.
- A save that was reported is not lost, no matter when the process is killed.
- On a CPU, a run that was interrupted by a signal or by kill -9 ends with the same weights, optimizer state and metric rows as
  an uninterrupted run, bit for bit. It repeats at most the updates after its newest checkpoint.
- The newest, the best and the newest healthy checkpoint are never deleted. NaN and infinity are never committed.

Not guaranteed: the same bits on another machine, with another version of torch, or on a GPU without `hardware.deterministic`.
Power loss was simulated from recorded system calls (R3), not tested on hardware. Network file systems and Windows were not
tested.
"""
ATTACKS = ("R1", "R2", "R3", "R4", "R6", "R7", "R9", "R10", "R12", "R13", "R17", "R22")


def newest(kind: str) -> dict[str, Any] | None:
    """Content of the newest result file of a kind, or None."""
    files = sorted(RESULTS.glob(f"*_{kind}_*.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def percent(share: float) -> str:
    """Format a share in percent, with two decimals below 10 %."""
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.0f} %"


def seconds(value: float) -> str:
    """Format seconds, with one decimal below 10."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def machine(result: dict[str, Any]) -> str:
    """Describe the machine, the package versions and the date of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kind = [f"{result['cores']} cores"] if "cores" in result else []
    kind += [f"{result['memory_gib']} GiB"] if "memory_gib" in result else []
    kind += [result["system"]] if isinstance(result.get("system"), str) else []
    return ", ".join([*kind, versions, result["date"]])


def attacks_section() -> str:
    """Section with the attacks on this package."""
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
        # The bound 3/N holds for random trials only, not for an exhaustive list.
        bound = percent(3 / attack["trials"]) if "=" in attack["command"] and not attack["failures"] else "-"
        also = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in attack["counts"].items())
        also = attack.get("note", also)
        tried = f"{attack['trials']:,} {attack['unit']}" + (f" ({also})" if also else "")
        rows.append([name, attack["attack"], tried, str(attack["failures"]), bound, attack["goal"], seconds(attack["wall_s"])])
        commands.append(f"{name}: {attack['command']}")
    header = ["", "attack", "trials", "failures", "95 % bound", "goal", "duration"]
    note = f"""
A failure is a failed test. The bound on the failure rate is 3/N for no failure in N random trials; `-` marks an exhaustive
test.

{machine(found)}; other programs ran on the machine.
`python benchmarks/reliability.py` runs all attacks. The commands for single attacks:
"""
    return text + table(header, rows) + note + "\n```\n" + "\n".join(commands) + "\n```\n"


def peers_section() -> str:
    """Section with the same attacks on other checkpointing systems."""
    text = "\n## The same attacks on other checkpointing systems\n\n"
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
Kills: each system saves after every update and receives SIGKILL at a random moment. Then its own resume call runs in a new
process. A trial is bad if the call raises, if the loaded state mixes two updates, or if it is older than the last save that had
returned. The kills hit in or near a save, so these shares rank the systems; they are not failure rates of real runs.

Damage: one file of the newest save is damaged. A trial is bad if a state that was never saved is loaded, or if the call raises
although an older save is intact. "More lost" counts calls that raised when no older save existed.
"""
    how = f"\n{machine(found)}, files {'in memory' if found['in_memory'] else 'on disk'}. `python benchmarks/crash.py`\n"
    return text + table(["system", "bad kills", "95 %", *kinds], rows) + note + how


def real_run_section() -> str:
    """Section with the killed run of bin/train on a real text."""
    text = "\n## A killed training run on real text\n\n"
    found = newest("killed_run")
    if found is None:
        return text + "Not run yet: `python benchmarks/killed_run.py`.\n"
    compared = ", ".join(key for key in found["compared"])
    verdict = "identical" if found["identical"] else f"DIFFERENT in {', '.join(found['different'])}"
    kills = f"{found['kills']} times at random moments, {found['kills_in_training']} of them during training"
    return f"""{text}`bin/train` with `configs/zh-medical-cpu.yaml` ran on a Chinese medical text
of {found["text_bytes"] / 1e6:.1f} MB for {found["updates"]} updates.
It was killed {kills} and the others during start-up. {found["kills_in_a_save"]} kills left a half-written save.
The same command was started again after each kill. Compared with the same run without kills: **{verdict}**.

Compared: {compared}.
`python benchmarks/killed_run.py`; {machine(found)}.
"""


def cost_section() -> str:
    """Section with the cost of saving."""
    text = "\n## Cost\n\n"
    found = newest("checkpoint_io")
    if found is None:
        return text + "Not run yet: `python benchmarks/checkpoint_io.py`.\n"
    rows = []
    if stall := found.get("stall"):
        size = f"quickstart, {stall['checkpoint_mib']:.1f} MiB, {stall['saves']} saves"
        rows += [
            [f"loop stall per save ({size})", f"{stall['stall_ms']:.1f} ms"],
            ["share of training time stalled, with one save per minute", percent(stall["stalled_share_at_a_save_a_minute"])],
            ["the same, including all CPU time of the writer thread", percent(stall["whole_cost_share_at_a_save_a_minute"])],
        ]
    if speed := found.get("speed"):
        size = f"{speed['state_mib']:.0f} MiB"
        rows += [
            [f"loop stall per save ({size}, background)", f"{speed['stall_ms']:.0f} ms"],
            ["write, with hash and fsync", f"{speed['synchronous_write_mib_per_s']:.0f} MiB/s"],
            ["plain write and fsync of the same number of bytes", f"{speed['bare_write_and_fsync_mib_per_s']:.0f} MiB/s"],
            ["load, with every byte verified", f"{speed['verified_load_mib_per_s']:.0f} MiB/s"],
        ]
    for name, memory in (found.get("memory") or {}).items():
        if isinstance(memory, dict):
            peak = f"{memory['resumed_mib']:.0f} / {memory['fresh_mib']:.0f} MiB = {memory['resumed_over_fresh']:.3f}"
            rows.append([f"peak memory of a resumed process / a new one ({name.replace('_', ' ')})", peak])
    return text + table(["", ""], rows) + f"\n`python benchmarks/checkpoint_io.py`; {machine(found)}.\n"


def make_report() -> str:
    """Text of the whole page."""
    return PROMISE + attacks_section() + peers_section() + real_run_section() + cost_section()


if __name__ == "__main__":
    REPORT.write_text(make_report(), encoding="utf-8")
