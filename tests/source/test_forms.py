"""Samples as public sets have them, from files and tables: what each becomes, and what is refused by name."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from jinja2 import TemplateSyntaxError

from cli.test_cli import refused
from mmq.cli.calibration import _rows
from mmq.errors import CalibrationError
from mmq.recipe import load
from mmq.source.chat_template import _joined, takes_parts
from mmq.source.forms import normal
from mmq.source.samples import most_tokens, read_samples
from source.conftest import WINDOW, Row, chat, described, texts, write_jsonl, write_sources

ASK, ANSWER = "Which expert?", "The third."
CHAT = chat(ASK, ANSWER)
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

# As given, and as messages or a text.
TAKEN: dict[str, tuple[Row, str, Row]] = {
    "OpenAI's messages": ({"messages": CHAT}, "messages", {"messages": CHAT}),
    "a text": ({"text": ASK}, "text", {"text": ASK}),
    "both": ({"messages": CHAT, "text": "else"}, "messages", {"messages": CHAT}),
    "ShareGPT": (
        {"id": "x", "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
        "ShareGPT",
        {"messages": CHAT},
    ),
    "ShareGPT with a system prompt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "user", "value": ASK}, {"from": "assistant", "value": ANSWER}],
        },
        "ShareGPT",
        {"messages": [SYSTEM, *CHAT]},
    ),
    "ShareGPT's turns as messages": (
        {"messages": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": ASK}]},
        "messages",
        {"messages": [SYSTEM, CHAT[0]]},
    ),
    "a conversation of messages": ({"conversation": CHAT}, "ShareGPT", {"messages": CHAT}),
    "an observation": (
        {"conversations": [{"from": "human", "value": ASK}, {"from": "observation", "value": "3"}]},
        "ShareGPT",
        {"messages": [CHAT[0], {"role": "tool", "content": "3"}]},
    ),
    "TRL's texts": (
        {"prompt": "The sky is", "completion": " blue."},
        "prompt-completion",
        {"text": "The sky is blue."},
    ),
    "TRL's messages": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "prompt-completion",
        {"messages": CHAT},
    ),
    "a prompt alone": ({"prompt": ASK}, "prompt-completion", {"text": ASK}),
    "a preference in texts": (
        {"prompt": ASK, "chosen": ANSWER, "rejected": "No."},
        "preference",
        {"text": ASK + ANSWER},
    ),
    "a preference that repeats its prompt": (
        {"prompt": ASK, "chosen": ASK + ANSWER, "rejected": ASK},
        "preference",
        {"text": ASK + ANSWER},
    ),
    "a preference of messages": ({"prompt": CHAT[:1], "chosen": CHAT[1:]}, "preference", {"messages": CHAT}),
    "a text and the whole conversation": (
        {"prompt": ASK, "chosen": CHAT, "rejected": []},
        "preference",
        {"messages": CHAT},
    ),
    "a text and its answer": ({"prompt": ASK, "chosen": CHAT[1:]}, "preference", {"messages": CHAT}),
    "the whole conversation alone": ({"chosen": CHAT, "rejected": CHAT[:1]}, "preference", {"messages": CHAT}),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        "instruction",
        {"messages": chat("Add.\n1 and 2", "3")},
    ),
    "Alpaca without input": ({"instruction": ASK, "input": "", "output": ANSWER}, "instruction", {"messages": CHAT}),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "one?"}]}
            ]
        },
        "messages",
        {"messages": [{"role": "user", "content": "Which\none?"}]},
    ),
    "parts of other names": (
        {
            "messages": [
                {"role": "user", "content": ["Which", {"type": "input_text", "text": "one?"}, {"text": "This?"}]}
            ]
        },
        "messages",
        {"messages": [{"role": "user", "content": "Which\none?\nThis?"}]},
    ),
    "no images": ({"messages": CHAT, "images": [], "image": None}, "messages", {"messages": CHAT}),
    "tools as JSON": (
        {"conversations": CHAT, "tools": json.dumps(TOOLS)},
        "ShareGPT",
        {"messages": CHAT, "tools": TOOLS},
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_form_becomes_what_it_means(name: str) -> None:
    given, form, meant = TAKEN[name]
    found, wanted = normal("here", given), normal("there", meant)
    assert found.form == form
    assert (found.text, found.tools) == (wanted.text, wanted.tools)
    assert list(map(_joined, found.messages or [])) == (wanted.messages or [])


def test_tokens_are_those_of_what_it_means(project: Path) -> None:
    """All of them through tokenizer and template, which would print a list of parts as Python."""
    write_jsonl(project / "given.jsonl", [given for given, _, _ in TAKEN.values()])
    write_jsonl(project / "meant.jsonl", [meant for _, _, meant in TAKEN.values()])
    recipe = write_sources(project, {"path": "given.jsonl"}, window=200)
    found = described(recipe)["total"]
    assert found["forms"] == Counter(form for _, form, _ in TAKEN.values())
    assert found["chat"] == sum("messages" in meant for _, _, meant in TAKEN.values())
    said = texts(recipe)
    assert said == texts(write_sources(project, {"path": "meant.jsonl"}, window=200))
    assert not any("{'type'" in text for text in said)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_of_a_table_are_read_alike(project: Path, name: str, form: str) -> None:
    given, _, _ = TAKEN[name]
    (project / "set").mkdir()
    recipe = load(write_sources(project, {"hub": "set", "samples": 1}))
    if form == "parquet" and "other names" not in name:  # a column has one type there
        datasets.Dataset.from_list([given]).to_parquet(str(project / "set" / "train.parquet"))
    else:
        write_jsonl(project / "set" / "train.jsonl", [given])
    ((_, where, row),) = read_samples(recipe, {})
    assert normal(where, row) == normal("here", given)


def test_a_column_of_lists_may_come_as_lists_of_its_fields(project: Path) -> None:
    """`datasets` stores a Sequence of objects so."""
    columns = {"conversations": {"from": ["human", "gpt"], "value": [ASK, ANSWER]}}
    write_jsonl(project / "columns.jsonl", [columns])
    write_jsonl(project / "rows.jsonl", [{"messages": CHAT}])
    found = texts(write_sources(project, {"path": "columns.jsonl"}))
    assert found == texts(write_sources(project, {"path": "rows.jsonl"}))


def test_a_chosen_column_may_be_of_any_form(project: Path) -> None:
    turns = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]
    write_jsonl(project / "set" / "train.jsonl", [{"talk": turns, "text": "else"}])
    write_jsonl(project / "meant.jsonl", [{"messages": CHAT}])
    found = texts(write_sources(project, {"hub": "set", "column": "talk", "samples": 1}))
    assert found == texts(write_sources(project, {"path": "meant.jsonl"}))


MARKS = {"utf-8-sig": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


@pytest.mark.parametrize("encoding", MARKS)
def test_a_byte_order_mark_is_no_part_of_the_first_sample(project: Path, encoding: str) -> None:
    """Windows' editors and PowerShell write one, and end lines in their own way."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in ("einige Wörter", "noch mehr"))
    data = lines.encode(encoding)
    data = data if data.startswith(MARKS[encoding]) else MARKS[encoding] + data
    (project / "samples.jsonl").write_bytes(data)
    assert texts(write_sources(project, {"path": "samples.jsonl", "samples": 2})) == ["einige Wörter", "noch mehr"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_may_be_one_array(project: Path, indent: int | None) -> None:
    """As many sets of instructions are published."""
    array = [TAKEN["Alpaca"][0], TAKEN["ShareGPT"][0]]
    (project / "array.json").write_text(json.dumps(array, indent=indent), encoding="utf-8")
    write_jsonl(project / "lines.jsonl", array)
    recipe = write_sources(project, {"path": "array.json"})
    assert texts(recipe) == texts(write_sources(project, {"path": "lines.jsonl"}))
    assert most_tokens(load(write_sources(project, {"path": "array.json"}))) == 2 * WINDOW
    assert "array.json has 2 samples" in refused(
        "calibration", write_sources(project, {"path": "array.json", "samples": 3})
    )
    (project / "array.json").write_text(json.dumps([*array, 5]), encoding="utf-8")
    assert "array.json sample 3 is not a JSON object" in refused("calibration", recipe_of(project))
    (project / "array.json").write_text(json.dumps(array)[:-1], encoding="utf-8")
    assert "array.json is not JSON" in refused("calibration", recipe_of(project))


def recipe_of(project: Path) -> Path:
    return write_sources(project, {"path": "array.json"})


def test_a_folder_of_csv_is_a_set(project: Path) -> None:
    (project / "set").mkdir()
    (project / "set" / "train.csv").write_text('instruction,input,output\n"Add.","1 and 2","3"\n', encoding="utf-8")
    write_jsonl(project / "meant.jsonl", [TAKEN["Alpaca"][2]])
    found = texts(write_sources(project, {"hub": "set", "samples": 1}))
    assert found == texts(write_sources(project, {"path": "meant.jsonl"}))


REFUSED: dict[str, tuple[Any, str]] = {
    "half a character": ({"text": "some \ud800 words"}, "holds half a character, the lone surrogate \\ud800"),
    "half a character in a chat": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
        "the lone surrogate \\udfff",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "a message holds a part of type 'image_url'; calibration takes text alone",
    ),
    "sound": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part of type 'input_audio'"),
    "a column of images": (
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}], "image": "a.jpg"},
        "has image; calibration takes text alone",
    ),
    "several columns": ({"messages": CHAT, "videos": ["a.mp4"]}, "has videos; calibration takes text alone"),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "instead of a text or a part",
    ),
    "an unknown voice": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "a turn is from 'narrator'; known are",
    ),
    "a text and messages": (
        {"prompt": ASK, "completion": CHAT},
        "prompt and completion must be two texts or two lists",
    ),
    "no form": ({"question": ASK, "answer": ANSWER}, "has no text: a sample is"),
    "broken tools": ({"messages": CHAT, "tools": "[{"}, "tools is neither a list nor JSON of one"),
    "a preference of two kinds": ({"prompt": CHAT[:1], "chosen": ANSWER}, "prompt and chosen must be two texts or"),
    "an empty prompt": ({"prompt": " ", "completion": ""}, "has no text"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_text_is_refused_by_name(fault: str) -> None:
    sample, message = REFUSED[fault]
    with pytest.raises(CalibrationError) as error:
        normal("odd.jsonl:2", sample)
    assert str(error.value).startswith("odd.jsonl:2")
    assert message in str(error.value)


def test_files_and_rows_name_the_sample(project: Path) -> None:
    image, message = REFUSED["an image"]
    write_jsonl(project / "odd.jsonl", [{"text": "some words"}, image])
    found = refused("calibration", write_sources(project, {"path": "odd.jsonl"}))
    assert found.startswith(f"{project / 'odd.jsonl'}:2") and message in found
    write_jsonl(project / "set" / "train.jsonl", [image])
    found = refused("calibration", write_sources(project, {"hub": "set", "samples": 1}))
    assert found.startswith("set sample 1") and message in found


LOOPS = {
    "{% for part in message.content %}{{ part.text }}{% endfor %}": True,
    "{% for part in message['content'] %}{{ part.text }}{% endfor %}": True,
    "{% macro say(content) %}{% for part in content %}{{ part.text }}{% endfor %}{% endmacro %}{{ say(1) }}": True,
    "{% for part in content | list %}{{ part.text }}{% endfor %}": True,
    "{% for message in messages %}{{ message.content }}{% endfor %}": False,
    "{% for message in messages %}{% for call in message.tool_calls %}{{ call }}{% endfor %}{% endfor %}": False,
}


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_goes_through_parts_is_known(template: str) -> None:
    assert takes_parts(template) == LOOPS[template]


def test_a_broken_template_is_no_template() -> None:
    with pytest.raises(TemplateSyntaxError):
        takes_parts("{% for")


def test_a_template_that_takes_parts_gets_them(project: Path) -> None:
    template = "{% for m in messages %}{% for p in m.content %}<{{ p.type }}:{{ p.text }}>{% endfor %}{% endfor %}"
    (project / "source" / "chat_template.jinja").write_text(template, encoding="utf-8")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    write_jsonl(project / "parts.jsonl", [{"messages": [{"role": "user", "content": parts}]}])
    assert texts(write_sources(project, {"path": "parts.jsonl"})) == ["<text:one><text:two>"]


def test_people_see_the_forms(project: Path) -> None:
    write_jsonl(project / "mix.jsonl", [TAKEN["ShareGPT"][0], TAKEN["ShareGPT"][0], TAKEN["Alpaca"][0]])
    found = described(write_sources(project, {"path": "mix.jsonl"}))
    assert [row["form"] for row in _rows(found)] == 2 * ["2 ShareGPT + 1 instruction"]
