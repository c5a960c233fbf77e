"""The model's own tokenizer and chat template: text and messages to token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmq.errors import CalibrationError, one_line, shown
from mmq.source.chat_template import Chat, render
from mmq.source.forms import Normal
from mmq.storage.checkpoint import CONFIG_NAME, read_json

# What transformers makes a tokenizer from, chat template included; config.json names its class where nothing else does.
TOKENIZER_FILES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "*.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# What a tokenizer may be made of besides, where the recipe trusts it.
CODE = "*.py"
# Of layers, heads, experts, labels in a config.json.
LARGEST_COUNT = 10**6


def tokenizer_files(folder: Path) -> list[Path]:
    candidates = [*folder.glob("*"), *(folder / TEMPLATES).glob("*")]
    return sorted(
        path for path in candidates if path.is_file() and any(fnmatch(path.name, name) for name in TOKENIZER_FILES)
    )


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    path = folder / CONFIG_NAME
    for key, value in (read_json(path) if path.exists() else {}).items():
        # transformers reads it as well, of whatever model, and makes lists as long as it says.
        if key.startswith("num_") and type(value) in (int, float) and value > LARGEST_COUNT:
            raise CalibrationError(f"{path}: {key} is {shown(value)}, more than {LARGEST_COUNT}")
    with _refused(f"{folder} holds no tokenizer that loads {'with' if trust_remote_code else 'without'} remote code"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def encode(tokenizer: Any, where: str, text: str, chat: bool) -> list[int]:
    """All tokens of a sample, at least one. A chat comes rendered, with its special tokens."""
    with _refused(f"{where}: the tokenizer refuses it"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if chat else tokenizer(text)["input_ids"]
    if not ids:
        raise CalibrationError(f"{where} has no tokens")
    return list(ids)


def render_chats(tokenizer: Any, chats: list[tuple[str, Normal]]) -> list[str]:
    """Chats as the model sees them, by its own template."""
    found = []
    for where, content in chats:
        messages, tools = content.messages or [], content.tools
        if not tokenizer.chat_template:
            raise CalibrationError(f"{where} has messages, but the tokenizer has no chat template")
        with _refused(f"{where}: the tokenizer has no chat template for it"):
            found.append(Chat(where, str(tokenizer.get_chat_template(tools=tools)), messages, tools))
    return render(found, tokenizer.special_tokens_map)


@contextmanager
def _refused(sentence: str) -> Iterator[None]:
    """Whatever a damaged tokenizer leads to becomes a CalibrationError, a panic of its Rust part included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CalibrationError(f"{sentence}: {one_line(error)}") from None
