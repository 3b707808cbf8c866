"""One word for one thing: the retired words of ``docs/glossary.md`` occur nowhere but
in the changelog.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from paths import ROOT

#: Files that are history, data or another's text, and those that have to name an old
#: word.
EXCEPTIONS = {
    r"CHANGELOG\.md": "history",
    r"LICENSE": "another's text",
    r"bench/results/.*|docs/(demo|performance|assets)/.*": "results and pictures that were made before",
    r"tests/oracles/.*|tests/integrations/.*_oracle\.py|tests/support/\w+\.txt": "what papers and other libraries wrote",
    r"reweight_ops/_core/moved\.py": "old import paths, whose error has the new one",
    r"reweight_ops/_core/names\.py": "old and foreign keywords, whose error has the new one",
    r"docs/glossary\.md|tests/repository/test_(words|renamed)\.py": "the retired words themselves",
}


def retired_words() -> dict[str, str]:
    """Word to the folder that it is retired in (empty: all), from the
    glossary's table."""
    table = (
        (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition("## Retired words\n")[2]
    )
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and "`" in cells[0]:
            folder = "" if cells[2] == "all" else cells[2].strip("`")
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), folder)
    return found


WORDS = retired_words()


def pattern(words: list[str]) -> re.Pattern[str]:
    """The words, whole or between underscores."""
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, words))})(?![A-Za-z0-9])")


def occurrences(path: str, text: str) -> Iterator[str]:
    words = [word for word, folder in WORDS.items() if path.startswith(folder)]
    for number, line in enumerate(text.splitlines()):  # line 0 is the path
        for match in pattern(words).finditer(line):
            yield f"{path}:{number}: {match[0]}"


def files() -> dict[str, str]:
    """Path to text of every file that the rule is about, names of files included."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {}
    for name in names:
        path = ROOT / name
        if any(re.fullmatch(exception, name) for exception in EXCEPTIONS) or not path.is_file():
            continue
        try:
            found[name] = f"{name}\n{path.read_text(encoding='utf-8')}"
        except UnicodeDecodeError:
            continue
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout: git lists the files")
def test_retired_words_do_not_occur():
    read = files()
    assert len(read) > 400
    found = [line for path, text in read.items() for line in occurrences(path, text)]
    assert not found, "\n".join(found)


def test_the_table_is_read():
    assert len(WORDS) > 40
    assert WORDS["sick"] == "" and WORDS["Twice"] == "csrc/"


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("csrc/cpu/a.h", "const bool sick_row = true;", 1),
        ("csrc/cuda/a.cu", "using Twice = T[2];  // is_out", 2),
        ("bench/a.py", '"""Twice as fast."""', 0),
        ("reweight_ops/a.py", "def why_not_this(coefs): ...  # the how manieth", 3),
        ("docs/a.md", "deadline, verbose, adverb, proverbs, musicked", 0),
    ],
)
def test_a_planted_word_is_found(path, line, found):
    assert len(list(occurrences(path, line))) == found
