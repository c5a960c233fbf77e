"""The forms that public sets have, and what each becomes: a text, or messages for the chat template.

| form | a sample |
|---|---|
| messages | `{"messages": [{"role": ..., "content": ...}]}`, OpenAI's |
| text | `{"text": ...}` |
| ShareGPT | `{"conversations": [{"from": "human", "value": ...}]}` |
| prompt-completion | TRL's `{"prompt": ..., "completion": ...}`: two texts, or two lists of messages |
| preference | TRL's `{"prompt": ..., "chosen": ..., "rejected": ...}`, of which the chosen answer is taken |
| instruction | Alpaca's `{"instruction": ..., "input": ..., "output": ...}` |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmq.errors import CalibrationError, shown

Content = dict[str, Any]
Messages = list[dict[str, Any]]

# Who says a turn in ShareGPT's sets, and what chat templates call it.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
} | {role: role for role in ("system", "user", "assistant", "tool", "developer")}
# Columns, and types of a message's parts, that are no text.
MEDIA = ("image", "audio", "video")
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Normal:
    """A sample as the tokenizer takes it: `text`, or `messages` with `tools`.

    Attributes:
        form: what it was given as; see the module's text.
        language: what it says of itself.
    """

    form: str
    text: str | None = None
    messages: Messages | None = None
    tools: list[Any] | None = None
    language: str | None = None


def normal(where: str, content: Content) -> Normal:
    """A sample of any known form.

    Raises:
        CalibrationError: it is of none, holds images or audio, or half a character.
    """
    _check_characters(where, content)
    language = content.get("language")
    for form, read in FORMS.items():
        found = read(where, content)
        if found is None:
            continue
        _check_media(where, content)
        named = language if isinstance(language, str) and language else None
        if isinstance(found, str):
            if not found.strip():
                break
            return Normal(form, text=found, language=named)
        if not found:
            break
        return Normal(form, messages=_checked(where, found), tools=_tools(where, content), language=named)
    raise CalibrationError(
        f'{where} has no text: a sample is {{"text": ...}}, {{"messages": [...]}}, {{"conversations": [...]}},'
        ' {"prompt": ..., "completion": ...}, {"prompt": ..., "chosen": ...} or {"instruction": ..., "output": ...}'
    )


def _messages(where: str, content: Content) -> Messages | None:
    return _turns(where, content.get("messages")) or None


def _text(where: str, content: Content) -> str | None:
    text = content.get("text")
    return text if isinstance(text, str) else None


def _share_gpt(where: str, content: Content) -> Messages | None:
    turns = next(
        (turns for key in ("conversations", "conversation") if (turns := _turns(where, content.get(key)))), None
    )
    system = content.get("system")
    if turns and isinstance(system, str) and system.strip() and turns[0].get("role") != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns


def _prompt_completion(where: str, content: Content) -> Messages | str | None:
    """TRL trains on the one directly after the other; a prompt may stand alone."""
    prompt, completion = content.get("prompt"), content.get("completion")
    if prompt is None:
        return None
    if isinstance(prompt, str) and isinstance(completion, str | None):
        return prompt + (completion or "")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return (_turns(where, prompt) or []) + (_turns(where, completion) or [])
    raise CalibrationError(f"{where}: prompt and completion must be two texts or two lists of messages")


def _preference(where: str, content: Content) -> Messages | str | None:
    """The prompt and the chosen answer, which in many sets begins with the prompt, or stands alone."""
    prompt, chosen = content.get("prompt"), content.get("chosen")
    if chosen is None:
        return None
    if isinstance(chosen, str) and isinstance(prompt, str | None):
        return chosen if not prompt or chosen.startswith(prompt) else prompt + chosen
    turns = _turns(where, chosen)
    if turns is None or not isinstance(prompt, str | list | None):
        raise CalibrationError(f"{where}: prompt and chosen must be two texts or two lists of messages")
    before = _turns(where, prompt) or []
    if isinstance(prompt, str) and prompt.strip() and len(turns) == 1:
        before = [{"role": "user", "content": prompt}]
    return turns if turns[: len(before)] == before else before + turns


def _instruction(where: str, content: Content) -> Messages | None:
    given = {key: content.get(key) for key in ("system", "instruction", "input", "output")}
    # A column of a CSV file may come as numbers.
    given |= {key: str(value) for key, value in given.items() if type(value) in (int, float)}
    texts = {key: text for key, text in given.items() if isinstance(text, str) and text.strip()}
    if "instruction" not in texts:
        return None
    asked = {"role": "user", "content": "\n".join(texts[key] for key in ("instruction", "input") if key in texts)}
    first = [{"role": "system", "content": texts["system"]}] if "system" in texts else []
    return [*first, asked, *([{"role": "assistant", "content": texts["output"]}] if "output" in texts else [])]


# The first that finds something counts.
FORMS: dict[str, Callable[[str, Content], Messages | str | None]] = {
    "messages": _messages,
    "text": _text,
    "ShareGPT": _share_gpt,
    "preference": _preference,
    "prompt-completion": _prompt_completion,
    "instruction": _instruction,
}


def _turns(where: str, value: Any) -> Messages | None:
    """Messages of a list with `role` and `content`, or ShareGPT's `from` and `value`, in each; None for no list."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # A table's column of lists comes as lists of its fields.
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        return None
    messages = []
    for turn in value:
        if isinstance(turn, dict) and turn.get("from") is not None and turn.get("role") is None:
            role = turn["from"]
            if not isinstance(role, str) or role not in ROLES:
                raise CalibrationError(f"{where}: a turn is from {shown(role)}; known are {', '.join(ROLES)}")
            turn = {"role": ROLES[role], "content": turn.get("value")}
        if not isinstance(turn, dict) or not turn.get("role"):
            raise CalibrationError(f"{where}: every message must be an object with a role")
        messages.append(turn)
    return messages


def _checked(where: str, messages: Messages) -> Messages:
    """Messages whose contents are texts, or lists of parts `{"type": "text", "text": ...}` alone."""
    return [
        message | {"content": [_part(where, part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _part(where: str, part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        raise CalibrationError(f"{where}: a message holds a part of type {shown(kind)}; calibration takes text alone")
    if kind is None or not isinstance(part.get("text"), str):
        raise CalibrationError(f"{where}: a message holds {shown(part)} instead of a text or a part with one")
    return {"type": "text", "text": part["text"]}


def _check_media(where: str, content: Content) -> None:
    """Raises CalibrationError for a column of images, audio or video beside the text, which then speaks of them."""
    for name in MEDIA:
        for column in (name, f"{name}s"):
            value = content.get(column)
            if value is not None and value not in ([], ""):
                raise CalibrationError(f"{where} has {column}; calibration takes text alone")


def _tools(where: str, content: Content) -> list[Any] | None:
    """Tools for the template; some sets have them as JSON in a string."""
    tools = content.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise CalibrationError(f"{where}: tools is neither a list nor JSON of one") from None
    return tools if isinstance(tools, list) and tools else None


def _check_characters(where: str, content: Content) -> None:
    """Raises CalibrationError for half a character, which JSON can spell and no text holds."""
    pending: list[Any] = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = ascii(value[error.start])[1:-1]
                raise CalibrationError(f"{where} holds half a character, the lone surrogate {half}") from None
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
