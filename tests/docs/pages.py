"""The pages of the documentation, the code blocks in them, and the simple commands in a block of shell.

A comment before a block says how its commands are tested:

    <!-- test: run -->             run as they stand, in a folder with PARENT, MODEL and the texts   tests/docs/test_commands.py
    <!-- test: client -->          run against a server at localhost:8000                            tests/e2e/test_docs.py
    <!-- test: outside; why -->    not run, for the reason given
    no comment                     not run: programs, files and options must exist

What is not run is checked against the programs it calls, so that no block is passed over.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("sh", "bash", "console")
MODES = ("run", "client", "outside", "checked")

_BLOCK = re.compile(
    r"^(?:<!-- test: (?P<comment>[^>]*) -->\n)?```(?P<language>[a-z]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    mode: str
    reason: str
    """Why it is not run; empty unless ``mode`` is outside."""

    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    content = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(content):
        mode, _, reason = (match["comment"] or "checked").partition(";")
        line = content[: match.start("text")].count("\n")
        found.append(Block(page.name, line, match["language"], mode.strip(), reason.strip(), match["text"]))
    return found


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in PAGES for block in blocks(page)]


def inline_commands(page: Path) -> list[str]:
    """Commands of ours within the text: `matgptq ...`, `python -m ...`."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`((?:matgptq|python -m) [^`]+)`", text)]


def shell_lines(block: Block) -> str:
    """The commands of a block: all of a shell block, and what follows a prompt in one without language."""
    if block.language in SHELL:
        return block.text
    if block.language:
        return ""
    return "\n".join(line[2:] for line in block.text.splitlines() if line.startswith("$ "))


def simple_commands(text: str) -> list[list[str]]:
    """The words of every simple command in shell text, without redirections and assignments before the command."""
    commands: list[list[str]] = []
    pending = ""
    for line in text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        # Usage: [--format a|b] is neither a glob nor a pipe.
        usage = re.sub(r"(?<=\w)\|[\w|-]+", "", re.sub(r"\[(--[^\]]*(?:\[[^\]]*\])?[^\]]*)\]", r"\1", pending))
        lexer = shlex.shlex(
            usage.replace("[", "").replace("]", "") if usage != pending else pending, posix=True, punctuation_chars=True
        )
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation goes on in the next line
            pending += "\n"
            continue
        pending = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if command:
                    commands.append(command)
                command = [">"] if set(word) <= set("<>") else []
            else:
                command.append(word)
    assert not pending, f"a quotation is not closed: {pending}"
    return [stripped for command in commands if command[0] != ">" and (stripped := _without_assignments(command))]


def _without_assignments(command: list[str]) -> list[str]:
    while command and re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    return command
