"""The shipped calibration samples: counts, lengths, structure, languages, scripts, and nothing said twice."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from typing import Any

import pytest

from conftest import ROOT

COUNTS = {"code": 40, "multilingual": 40, "reasoning": 24, "diverse": 24, "eval": 24}
# Tokens of a 200k vocabulary per character, measured loosely: letters of long words, other alphabets, ideographs.
LATIN, ALPHABETIC, WIDE = 1 / 4.3, 1 / 2.6, 1 / 1.45
SCRIPTS = (
    "LATIN",
    "CYRILLIC",
    "GREEK",
    "ARABIC",
    "HEBREW",
    "DEVANAGARI",
    "BENGALI",
    "THAI",
    "HANGUL",
    "HIRAGANA",
    "CJK",
)

Sample = dict[str, Any]


def samples(name: str) -> list[Sample]:
    path = ROOT / "calibration_data" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text(sample: Sample) -> str:
    return "\n".join(
        (message.get("content") or "") + json.dumps(message.get("tool_calls") or "", ensure_ascii=False)
        for message in sample["messages"]
    )


def estimated_tokens(content: str) -> float:
    wide = sum(ord(c) > 0x2E80 for c in content)
    alphabetic = sum(0x250 <= ord(c) <= 0x2E80 for c in content)
    return (len(content) - wide - alphabetic) * LATIN + alphabetic * ALPHABETIC + wide * WIDE


def scripts(content: str) -> set[str]:
    """Scripts that make up at least a tenth of the letters."""
    letters = [unicodedata.name(c, "?").split()[0] for c in content if c.isalpha()]
    return {script for script, count in Counter(letters).items() if count > len(letters) / 10}


def ngrams(content: str) -> set[tuple[str, ...]]:
    """Runs of 12 words; of 24 characters where a script puts no spaces between words."""
    spaceless = sum(ord(c) > 0x2E80 or 0xE00 <= ord(c) <= 0xE7F for c in content) > len(content) / 4
    parts, size = (list(re.sub(r"\s", "", content)), 24) if spaceless else (re.findall(r"\w+", content.lower()), 12)
    return {tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)}


@pytest.mark.parametrize("name", COUNTS)
def test_each_file_has_its_samples_in_the_models_chat_form(name: str) -> None:
    found = samples(name)
    assert len(found) == COUNTS[name]
    for sample in found:
        roles = [message["role"] for message in sample["messages"]]
        assert set(roles) <= {"system", "user", "assistant", "tool"}, sample["id"]
        assert roles.index("user") <= 1 and roles[-1] == "assistant", sample["id"]
        assert roles.count("system") == (roles[0] == "system"), sample["id"]
        assert sample["language"] and sample["topic"], sample["id"]
        assert estimated_tokens(text(sample)) > 800, sample["id"]
    assert len({sample["id"] for sample in found}) == len(found)


def test_samples_differ_in_structure() -> None:
    everything = [sample for name in COUNTS for sample in samples(name)]
    turns = Counter(sum(m["role"] == "user" for m in sample["messages"]) for sample in everything)
    assert sum(count for number, count in turns.items() if number > 1) >= 30
    assert turns[1] >= 30
    assert sum(sample["messages"][0]["role"] == "system" for sample in everything) >= 20
    assert sum(any(m.get("tool_calls") for m in sample["messages"]) for sample in everything) >= 5


def test_code_covers_languages_diffs_and_tests() -> None:
    found = samples("code")
    assert len({sample["language"].lower() for sample in found}) >= 12
    assert sum(re.search(r"^@@ ", text(sample), re.MULTILINE) is not None for sample in found) >= 3
    assert sum(re.search(r"\b(assert|expect|#\[test\]|pytest)\b", text(sample)) is not None for sample in found) >= 5


def test_multilingual_covers_languages_and_scripts_in_the_language_itself() -> None:
    found = samples("multilingual")
    assert len({sample["language"].split(" (")[0] for sample in found}) >= 20
    seen = set()
    for sample in found:
        users = "".join(m["content"] for m in sample["messages"] if m["role"] == "user")
        own = scripts(text(sample)) & set(SCRIPTS)
        assert own & scripts(users), f"{sample['id']}: the user writes in another script"
        seen |= own
    assert len(seen) >= 6, seen


def test_no_two_samples_share_a_long_run_of_words() -> None:
    owner: dict[tuple[str, ...], str] = {}
    for name in COUNTS:
        for sample in samples(name):
            for gram in ngrams(text(sample)):
                other = owner.setdefault(gram, sample["id"])
                assert other == sample["id"], f"{sample['id']} and {other} share {' '.join(gram)!r}"
