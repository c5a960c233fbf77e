"""Rendering a checkpoint's chat template: a program by whoever wrote the checkpoint, in a process of its own.

transformers renders Jinja templates in a sandbox that keeps them from Python's objects, but not from looping for ever
or filling the memory. The process here imports transformers' renderer and no torch, takes one chat after the other as
JSON, and has limits of time and memory. Run as a module this file is that process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmq.errors import CalibrationError, one_line

# For all chats of a run, imports aside; 128 of 16,000 characters take half of one.
SECONDS = 60
# On top of what the process takes before the first template.
MEMORY = 2**30
# A template adds roles and a system prompt to a chat and escapes some of it. What comes out must be tokenized as well.
LARGEST_GROWTH = 8
LARGEST_ADDITION = 2**20


@dataclass(frozen=True)
class Chat:
    """One chat for a template.

    Attributes:
        where: how messages name it.
        template: Jinja, of `tokenizer.get_chat_template`.
        messages, tools: as a sample holds them.
    """

    where: str
    template: str
    messages: list[Any]
    tools: list[Any] | None


def render(chats: list[Chat], special_tokens: dict[str, Any]) -> list[str]:
    """What `tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)` gives for each chat.

    Args:
        special_tokens: the tokenizer's `special_tokens_map`; templates know them by these names.

    Raises:
        CalibrationError: a template is broken, refuses a chat, or takes too much time or memory; it names the chat.
    """
    if not chats:
        return []
    # What JSON lacks, such as a table's dates, goes as its text, which is what a template would print of it.
    lines = [
        json.dumps([chat.template, [*map(_called, chat.messages)], chat.tools, special_tokens], default=str)
        for chat in chats
    ]
    # -P: never import from the current folder, which may be the checkpoint's.
    command = [sys.executable, "-P", "-m", "mmq.source.chat_template", str(SECONDS)]
    run = subprocess.run(command, input="\n".join(lines).encode(), capture_output=True, check=False)
    answers = [json.loads(line) for line in run.stdout.split(b"\n")[:-1]]
    for chat, answer in zip(chats, answers, strict=False):
        if "error" in answer:
            raise CalibrationError(f"{chat.where}: the chat template {answer['error']}")
    if len(answers) < len(chats):
        where = chats[len(answers)].where
        if run.returncode == -signal.SIGALRM:
            raise CalibrationError(f"{where}: the chat template took more than {SECONDS} seconds")
        reason = one_line(run.stderr.decode(errors="replace")[-300:]) or f"exit status {run.returncode}"
        raise CalibrationError(f"{where}: the process that renders the chat template ended: {reason}")
    return [answer["text"] for answer in answers]


def _called(message: Any) -> Any:
    """A message with its tool calls' arguments as objects. OpenAI's protocol has them as JSON in a string, templates go
    through their items; vLLM parses them before rendering, and so what is calibrated on is what is served."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return message | {"tool_calls": [*map(_parsed, calls)]} if isinstance(calls, list) else message


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


@cache
def takes_parts(template: str) -> bool:
    """Whether a template goes through a message's content part by part, or prints it as it is: whether it has a loop
    over something called content, as vLLM decides it.

    Raises:
        TemplateSyntaxError, RecursionError: it is no template.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for loop in _compile_jinja_template(template).environment.parse(template).find_all(nodes.For):
        over = loop.iter
        while isinstance(over, nodes.Filter) and over.node is not None:
            over = over.node
        names = (
            getattr(over, "name", None),
            getattr(over, "attr", None),
            getattr(getattr(over, "arg", None), "value", None),
        )
        if "content" in names:
            return True
    return False


def _joined(message: Any) -> Any:
    """A message whose parts, all texts, are one text, a line each as vLLM joins them."""
    parts = message.get("content") if isinstance(message, dict) else None
    return message | {"content": "\n".join(part["text"] for part in parts)} if isinstance(parts, list) else message


def _answer(line: bytes) -> dict[str, str]:
    """The rendered text of a request, or why there is none."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template, messages, tools, special_tokens = json.loads(line)
    try:
        if not takes_parts(template):
            messages = [_joined(message) for message in messages]
        rendered, _ = render_jinja_template([messages], tools=tools, chat_template=template, **special_tokens)
    except MemoryError:
        return {"error": f"takes more than {MEMORY // 2**20} MiB of memory"}
    except Exception as error:  # templates raise whatever their author chose
        return {"error": f"refuses it: {one_line(error)}"}
    if len(rendered[0]) > LARGEST_GROWTH * len(line) + LARGEST_ADDITION:
        return {"error": f"makes {len(rendered[0]):,} characters of a chat of {len(line):,}"}
    return {"text": rendered[0]}


def _serve(seconds: int) -> None:
    """Answer the requests on standard input, a line each, until one fails."""
    import transformers.utils.chat_template_utils  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    requests = sys.stdin.buffer.read().split(b"\n")
    limit = pages * os.sysconf("SC_PAGE_SIZE") + sum(map(len, requests)) + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # The system ends this process where it stands, in the midst of a library's loop as well, and with no parent left.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    for line in requests:
        answer = _answer(line)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        if "error" in answer:
            break


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
