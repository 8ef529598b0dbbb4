"""The language of sources, docs and messages (CONTRIBUTING.md): words that have one standard term instead."""

import re

import pytest

from tests.files import ROOT

# Add a package or page once it is rewritten.
DONE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs",
    "alpha_clip_commands",
    "vision_tower",
    "mllm",
    "eval",
    "train",
    "scripts",
)
SUFFIXES = (".py", ".md", ".yaml", ".html", ".toml")
TERMS = {
    r"picture": "image",
    r"colour": "color",
    r"grey": "gray",
    r"centre": "center",
    r"licence": "license",
    r"behaviour": "behavior",
    r"neighbour": "neighbor",
    r"labelled|labelling": "labeled, labeling",
    r"quantis": "quantized",
    r"(normal|token|recogn|summar|optim|serial|organ|minim|maxim|initial|general)is(e|ing|ation)": "-ize",
    r"\banew\b": "again",
    r"\b(goes|go|going|went) on\b": "continues, resumes",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bno numbers?\b": "NaN or Inf",
    r"\bso (many|few)\b": "at most N",
    r"\bcut short\b": "truncated",
    r"\bletter for letter\b": "exact match",
    r"\bbit for bit\b": "bit-identical",
    r"\bdrawn (world|scenes?)\b": "synthetic scenes, Shapes",
    r"\basked one\b": "the sample's own region",
    r"\b(said|stands?) beside\b": "marked, comparable with",
    r"\bat hand\b": "available",
}
# Data, other people's names, and keys of files that earlier versions wrote.
ALLOWED = (
    '"colour"',  # an attribute and a question type of Shapes
    "| colour",  # the same in a table
    "What colour is this?",
    "What is its colour?",
    '"neighbour"',
    "| neighbour",
    '"centre"',  # an answer of Shapes
    "pictures.arrow",  # a file of an index
    "eval_pictures",  # a key of recipes
    "skipped_pictures",
    "quantised",
    "Where in the picture is this?",
    "In which part of the picture is it?",
    "region in the picture",  # prompts of GPT4RoI
    '"pictures"',
    '"picture"',
    '"colour": tuple(',
    "skipped_images",
)


def words_in(text):
    """The lines with a word that has a standard term, as "LINE: WORD; write TERM"."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for allowed in ALLOWED:
            line = line.replace(allowed, "")
        for pattern, term in TERMS.items():
            if match := re.search(pattern, line, re.IGNORECASE):
                found.append(f"{number}: {match[0]!r}; write {term}")
    return found


def files_of(name):
    path = ROOT / name
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    return [file for file in files if ROOT / "mllm" / "assets" not in file.parents]


def test_words_have_one_standard_term():
    found = [
        f"{file.relative_to(ROOT)}:{word}"
        for name in DONE
        for file in files_of(name)
        for word in words_in(file.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["# the Pictures of a row", "class PictureSet: pass", "COLOURS = {}", "def normalise(x): ...", "it goes on"]
)
def test_a_word_is_found(text):
    assert words_in(text)


@pytest.mark.parametrize("text", ['"colour": ("What colour is this?",', "an optimistic bound", "at most 3 images"])
def test_data_and_other_words_are_allowed(text):
    assert not words_in(text)
