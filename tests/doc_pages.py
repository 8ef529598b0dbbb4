"""The pages of the documentation: their code blocks, commands, inline code and tables."""

import re
import shlex
from typing import NamedTuple

from tests.files import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mllm/assets/model/README.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


class Block(NamedTuple):
    """A fenced code block: page, number of its first line, language ("" if none) and text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self):
        return f"{self.page}:{self.line}"


def blocks(language):
    """All code blocks in a language, dedented."""
    found = []
    for page, text in PAGES.items():
        for match in _BLOCK.finditer(text):
            indent, name, body = match.groups()
            if name == language:
                body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
                found.append(Block(page, text[: match.start()].count("\n") + 1, name, body))
    return found


def commands():
    """(name, words) of every command in the shell blocks, without environment variables."""
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    command.append(word)
                elif command:
                    yield block.name, without_environment(command)
                    command = []


def without_environment(words):
    """The words of a command without the leading VARIABLE=value."""
    first = next(index for index, word in enumerate(words) if not _ENVIRONMENT.fullmatch(word))
    return words[first:]


def inline_code():
    """(page, code) of every code span outside code blocks."""
    for page, text in PAGES.items():
        for match in re.finditer(r"`([^`]+)`", _BLOCK.sub("", text)):
            yield page, " ".join(match[1].split())


def rows(page, text=None):
    """The table rows of a page as lists of cells, without bold and links."""
    found = []
    for line in (PAGES[page] if text is None else text).splitlines():
        if line.startswith("|"):
            plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", line).replace("**", "").replace("`", "")
            found.append([cell.strip() for cell in plain.strip("|").split("|")])
    return found
