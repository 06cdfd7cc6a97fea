"""Find the commands in the documents: every launcher call in a code block of the README and of docs/."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_RUN = ROOT / "docs" / "first-run.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTERS = ("srun", "exec", "torchrun", "accelerate")
"""Commands that start a launcher and may have their own options."""
CALL = re.compile(rf"(?:^|&& |\| |\b(?:{'|'.join(STARTERS)}) (?:.* )?)bin/\w+")


@dataclass(frozen=True, order=True)
class Shown:
    """One call: page, launcher, arguments, and the text that an `echo` pipes into it."""

    page: str
    launcher: str
    arguments: tuple[str, ...]
    stdin: str | None

    def __str__(self) -> str:
        return f"{self.page} {self.launcher} {' '.join(self.arguments)}"


def code_lines(page: Path) -> Iterator[str]:
    """Yield the lines of all fenced or indented code blocks, with backslash continuations joined."""
    fenced = False
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def first_block(page: Path) -> list[str]:
    """Return the lines of the first fenced block."""
    return page.read_text(encoding="utf-8").split("```")[1].strip().splitlines()


def shown_commands() -> list[Shown]:
    """Return all calls, without duplicates on a page."""
    calls: set[Shown] = set()
    for page in PAGES:
        for line in code_lines(page):
            if CALL.search(line):
                calls.update(_calls(page.name, shlex.split(line, comments=True)))
    return sorted(calls, key=str)


def _calls(page: str, words: list[str]) -> Iterator[Shown]:
    """Yield the calls in one line, without the output file after `>`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&"):
            parts.append([])
        else:
            parts[-1].append(word)
    for before, part in pairwise([[], *parts]):
        starts = next((place for place, word in enumerate(part) if word.startswith("bin/")), 0)
        called = part[starts:] if part[:1] and part[0] in STARTERS else part
        if called and called[0].startswith("bin/"):
            end = called.index(">") if ">" in called else len(called)
            yield Shown(page, called[0], tuple(called[1:end]), before[1] + "\n" if before[:1] == ["echo"] else None)
