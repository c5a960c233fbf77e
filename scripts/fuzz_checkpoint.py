"""Feeds hostile checkpoints, recipes and samples to the commands of mmq, and counts what becomes of them.

A tiny valid project is changed in one to three places: bytes and structure of the safetensors headers, files cut or
swapped, index, config.json, tensor data, tokenizer, chat template, recipe, samples. Each input then goes through what a
user would run: `mmq run --dry-run`, `mmq plan`, `mmq dequant`, and for a share also `mmq awq`, `restore` and `verify`.
An input must end with success or with exit code 2 and one printable line on standard error. All else is a failure:
another exception, death by a signal, more than SECONDS, more than MEMORY, a write outside work_dir, a process started,
a connection, an object unpickled. Each input is made from `--seed` and its number alone; `--number` repeats one. What
a stage refuses after `run --dry-run` took it is counted and told apart: only content of tensors may be.

    python scripts/fuzz_checkpoint.py --inputs 20000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "LLM_COMPRESSOR_LOG_DISABLED": "true",
}

import xxhash
import yaml
from typer.testing import CliRunner

from mmq.cli.app import app
from mmq.errors import RecipeError
from mmq.recipe import load
from mmq.source.synth import Sizes, write_checkpoint, write_samples

SIZES = Sizes(
    layers=1, hidden=128, intermediate=128, experts=2, top_k=1, heads=2, kv_heads=1, head_dim=64, vocabulary=300
)
SAMPLES = 4
SECONDS = 60
# Of resident memory, on top of what the process had before an input; a clean run of the tiny model takes a tenth.
MEMORY = 400 * 2**20
# Of address space. What asks for more fails, as on a machine without that much.
ADDRESSES = 4 * 2**30
BATCH = 200
AWQ_SHARE = 0.08
INDEX = "source/model.safetensors.index.json"
CONFIG = "source/config.json"

# Values where another kind, size or sign is expected.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 127, 129, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**12, 10**30,
    0.5, -1.5, 1e308, 1e-320, "", "0", "many", "\x1b[31m", "a\nb", "\x00", "é", [], [[]], [1, 2], {}, {"a": {}},
    "x" * 5000,
]  # fmt: skip
# JSON that only some readers take, and numbers that Python does not print.
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 5000, '"\\ud800"', "[" * 300 + "]" * 300, "tru", ""]
NAMES = [
    "", "/", "../x", "..\\x", "a/b", "/etc/passwd", "a\x00b", "a\nb", "\x1b[2Jname", "\x9b31m", "\u202ename", "\u2028",
    "n" * 2000, "n" * 200_000, "__metadata__", "model.layers.00.self_attn.q_proj.weight",
    "model.layers.٠.self_attn.q_proj.weight", "model.layers." + "9" * 5000 + ".x", "model.layers.-1.x",
    "mоdel.layers.0.self_attn.q_proj.weight", "model.layers.0.block_sparse_moe.experts.00.w1.weight",
    "model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.weight_scale", "model.layers.0.self_attn.k_scale", "{layer}", "%s", "[red]x[/red]",
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U64", "C64", "BOOL", "f32", "X"]
SHARDS = [
    "../secret.safetensors", "/etc/passwd", "x/../model.safetensors", "./model.safetensors", "model.bin",
    ".safetensors",
    "\x1b[31m.safetensors", "a\x00.safetensors", "n" * 300 + ".safetensors", "..", "", "dir.safetensors",
    "model-00009-of-00002.safetensors", "C:\\x.safetensors", "~/x.safetensors", "link.safetensors",
    "\\..\\x.safetensors",
]  # fmt: skip
CONFIG_KEYS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rotary_dim", "rope_theta", "num_local_experts", "num_experts_per_tok", "hidden_act", "rms_norm_eps", "vocab_size",
    "max_position_embeddings", "tie_word_embeddings", "scoring_func", "architectures", "model_type", "torch_dtype",
    "quantization_config", "rope_parameters", "rope_scaling", "partial_rotary_factor", "attention_dropout", "dtype",
    "layer_types", "sliding_window", "pad_token_id", "use_cache", "_attn_implementation", "attn_implementation",
    "transformers_version", "auto_map", "id2label", "num_labels", "output_attentions", "return_dict", "to_dict",
    "__class__", "router_jitter_noise", "attribute_map", "use_qk_norm", "qk_norm_type", "initializer_range",
    "name_or_path",
]  # fmt: skip
ROPE = [
    {"rope_type": kind, "rope_theta": theta, "factor": factor}
    for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "nonsense", None, 5, [])
    for theta in (10000.0, 0, -1, "x", None, 1e308)
    for factor in (2.0, 0, -1, "x", None, 10**30)
]
TEMPLATES = [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}",
    "{{ 'a' * 10**10 }}", "{{ range(10**9)|list }}", "{{ '%10000000000d' % 3 }}", "{% for", "{{ 1 / 0 }}", "",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ raise_exception('\x1b[31mno') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}", "{{ lipsum.__globals__['os'].system('touch ' + 'x') }}", "{{ 'x' * 20000000 }}",
    "{{ ''|attr('__class__') }}", "{{ messages[0].content.encode() }}", "{{ '\\ud800' }}", "{{" + "(" * 5000,
    "{{ messages|tojson }}", "{{ self }}", "{{ namespace(a=1).a }}", "{{ 10**5000 }}",
    "{{ bos_token }}{{ nothing.here }}",
]  # fmt: skip
YAML = [
    "!!python/object/apply:os.system ['touch x']", "!!python/name:os.system", "!custom x", "&a [*a]", "*nothing",
    "&a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]", "0x" + "f" * 5000, "9" * 5000, "2024-99-99", "!!binary '%%'", ".nan",
    ".inf", "-.inf", "1e400", "{? [a] : b}", "<<: {a: 1}", "'\x00'", '"\\ud800"', '"\\0"', "~nobody-here/x",
    "/dev/null",
    "../outside", "{" * 3000, "- " * 3000, "yes", "1_000", "1:30", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 5",
    "@x", "%x",
]  # fmt: skip
OVERRIDES = [
    "model.source",
    "work_dir",
    "workers",
    "awq.n_grid",
    "awq.memory_budget",
    "awq.source",
    "seed",
    "model",
    ".",
    "=",
    "a.b",
]


class Marker:
    """Unpickling one makes a file where no file must appear."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("outside/unpickled"),)


@dataclass
class Project:
    """An input before it is written: content by path, links by path, and what is added to the commands."""

    files: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    awq: bool = False

    def text(self, path: str) -> str:
        return self.files[path].decode(errors="replace")

    def json(self, path: str) -> Any:
        try:
            return json.loads(self.files[path])
        except (ValueError, KeyError, RecursionError):
            return {}

    def shards(self) -> list[str]:
        return sorted(path for path in self.files if path.endswith(".safetensors"))

    def shard(self, path: str) -> tuple[dict[str, Any], bytes]:
        """Header and data; an empty header where an earlier change left none."""
        content = self.files[path]
        length = int.from_bytes(content[:8], "little")
        try:
            header = json.loads(content[8 : 8 + length])
        except (ValueError, RecursionError):
            header = {}
        return (header if isinstance(header, dict) else {}), content[8 + length :]

    def put_shard(self, path: str, header: bytes, data: bytes, length: int | None = None) -> None:
        size = len(header) if length is None else length
        self.files[path] = (size % 2**64).to_bytes(8, "little") + header + data


Mutation = Callable[[Project, random.Random], None]


def any_bytes(content: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, set, dropped, doubled or inserted."""
    result = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(result):
            result[at] = chance.choice(b'\x00\xff"{}[],:0129-eE\\\x1b\n')
        elif kind == 2:
            del result[at : at + chance.choice((1, 4, 100))]
        elif kind == 3:
            result[at:at] = result[at : at + chance.choice((1, 20, 200))]
        else:
            result[at:at] = chance.randbytes(chance.choice((1, 3, 50)))
    return bytes(result)


def dump(value: Any, chance: random.Random) -> bytes:
    """JSON, in one of twenty with a value that is none in the place of another."""
    text = json.dumps(value)
    if chance.random() < 0.05:
        places = [at for at, letter in enumerate(text) if letter in ":,["]
        if places:
            at = chance.choice(places) + 1
            text = text[:at] + chance.choice(RAW) + ("," if text[at - 1] in ",[" else text[at:][:0]) + text[at:]
    return text.encode()


def odd(chance: random.Random) -> Any:
    return chance.choice(ODD)


def change_inside(value: Any, chance: random.Random) -> Any:
    """Replace, drop or add something anywhere below a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: change_inside(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(min(len(value), 50))
        return [*value[:at], change_inside(value[at], chance), *value[at + 1 :]]
    return odd(chance)


def header_bytes(project: Project, chance: random.Random) -> None:
    path = chance.choice(project.shards())
    content = project.files[path]
    length = min(int.from_bytes(content[:8], "little"), len(content))
    project.files[path] = content[:8] + any_bytes(content[8 : 8 + length], chance) + content[8 + length :]


def header_bytes_of_right_length(project: Project, chance: random.Random) -> None:
    path = chance.choice(project.shards())
    content = project.files[path]
    length = min(int.from_bytes(content[:8], "little"), len(content))
    project.put_shard(path, any_bytes(content[8 : 8 + length], chance), content[8 + length :])


def header_length(project: Project, chance: random.Random) -> None:
    path = chance.choice(project.shards())
    content = project.files[path]
    true = int.from_bytes(content[:8], "little")
    lengths = [
        0,
        1,
        2,
        7,
        true - 1,
        true + 1,
        true + 8,
        len(content) - 8,
        len(content),
        10**8,
        10**8 + 1,
        2**31,
        2**63,
        2**64 - 1,
    ]
    project.files[path] = (chance.choice(lengths) % 2**64).to_bytes(8, "little") + content[8:]


def header_whole(project: Project, chance: random.Random) -> None:
    path = chance.choice(project.shards())
    header, data = project.shard(path)
    text = json.dumps(header)
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    whole = [
        b"", b"{}", b"[]", b"null", b"5", b'"x"', b"{" * 5000, b"[" * 100_000, b"\xff\xfe{}", text.encode("utf-16"),
        b" " * 100_000 + text.encode(), text.encode() + b" " * 100_000, text.encode() + b"{}", text[1:].encode(),
        json.dumps(header | many).encode(), json.dumps(many | header).encode(), b"{" + text[1:-1].encode() + b",}",
    ]  # fmt: skip
    project.put_shard(path, chance.choice(whole), data)


def header_json(project: Project, chance: random.Random) -> None:
    """One entry of a header: offsets, dtype, shape, keys."""
    path = chance.choice(project.shards())
    header, data = project.shard(path)
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names:
        return
    name = chance.choice(names)
    entry = dict(header[name])
    begin, end = (
        entry["data_offsets"]
        if isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2
        else (0, 0)
    )
    begin, end = (value if isinstance(value, int) else 0 for value in (begin, end))
    other = header[chance.choice(names)]
    shape = entry["shape"] if isinstance(entry.get("shape"), list) else []
    changes: list[dict[str, Any]] = [
        {"data_offsets": value}
        for value in (
            [end, begin], [begin, begin], [begin + 1, end + 1], [begin, end + 1], [begin, end - 1], [begin, 2**63],
            [2**64 - 1, 2**64], [-1, end], [float(begin), float(end)], [begin], [begin, end, end], [str(begin),
            str(end)],
            other.get("data_offsets"), [0, end - begin], [len(data), len(data) + end - begin], odd(chance),
            [odd(chance), odd(chance)],
        )
    ] + [
        {"shape": value}
        for value in (
            [*shape, 1], [1, *shape], shape[::-1], [-side for side in shape if isinstance(side, int)], [2**63,
            *shape[1:]],
            [2**32, 2**32], [2**62, 4], [0], [0, 2**62], [2**62, 0], [], [1] * 100, [1] * 3000, [0] * 70, [shape],
            [float(s) for s in shape if isinstance(s, int)],
            [True], odd(chance), [odd(chance)],
        )
    ]  # fmt: skip
    changes += [{"dtype": chance.choice(DTYPES)}, {"dtype": odd(chance)}, {"more": odd(chance)}]
    # A change that keeps bytes and offsets in agreement gets further.
    changes += [
        {"dtype": "U8", "shape": [end - begin]},
        {"dtype": "BOOL", "shape": [end - begin]},
        {"dtype": "I8", "shape": [1, end - begin]},
    ] * 3
    if chance.random() < 0.1:
        entry.pop(chance.choice(list(entry)), None)
    else:
        entry |= chance.choice(changes)
    project.put_shard(path, dump(header | {name: entry}, chance), data)


def header_metadata(project: Project, chance: random.Random) -> None:
    path = chance.choice(project.shards())
    header, data = project.shard(path)
    value = chance.choice(
        [odd(chance), {"format": odd(chance)}, {chance.choice(NAMES): "x"}, {"format": "tf"}, {"a": "b" * 10**6}]
    )
    project.put_shard(path, dump(header | {"__metadata__": value}, chance), data)


def header_twice(project: Project, chance: random.Random) -> None:
    """A name twice in one header, the same or with other contents, in both orders."""
    path = chance.choice(project.shards())
    header, data = project.shard(path)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    name, other = chance.choice(names), chance.choice(names)
    entry = chance.choice([header[name], header[other], change_inside(header[name], chance)])
    extra = f"{json.dumps(name)}: {json.dumps(entry)}"
    text = json.dumps(header)
    text = f"{{{extra}, {text[1:]}" if chance.random() < 0.5 else f"{text[:-1]}, {extra}}}"
    project.put_shard(path, text.encode(), data)


def names(project: Project, chance: random.Random) -> None:
    """A tensor renamed or added, in the header and, mostly, in the index as well."""
    path = chance.choice(project.shards())
    header, data = project.shard(path)
    tensors = [name for name in header if name != "__metadata__"]
    if not tensors:
        return
    old = chance.choice(tensors)
    new = chance.choice(
        [*NAMES, old[::-1], old.upper(), old + chance.choice(string.printable), chance.choice(tensors) + "_x"]
    )
    index = project.json(INDEX)
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if chance.random() < 0.5:
        header = {new if name == old else name: entry for name, entry in header.items()}
        if isinstance(mapping, dict) and chance.random() < 0.9:
            mapping = {new if name == old else name: shard for name, shard in mapping.items()}
    else:
        shape = chance.choice([[0], [0, 2**40], [0] * 60, [0, 0]])
        header |= {
            new: {"dtype": chance.choice([*DTYPES[:6], "I64", "BOOL"]), "shape": shape, "data_offsets": [len(data)] * 2}
        }
        if isinstance(mapping, dict):
            mapping = mapping | {new: path.removeprefix("source/")}
    project.put_shard(path, json.dumps(header, ensure_ascii=chance.random() < 0.5).encode(errors="replace"), data)
    if isinstance(mapping, dict):
        project.files[INDEX] = json.dumps(index | {"weight_map": mapping}).encode()


def files(project: Project, chance: random.Random) -> None:
    """A shard cut, grown, swapped, missing, a folder, a link, a pickle."""
    path = chance.choice(project.shards())
    content = project.files[path]
    kind = chance.randrange(10)
    if kind == 0:
        project.files[path] = content[: chance.randrange(len(content) + 1)]
    elif kind == 1:
        project.files[path] = content + chance.choice([b"\0", b"x" * 8, chance.randbytes(1000), content])
    elif kind == 2:
        project.files[path] = chance.choice(
            [b"", b"\0" * 8, b"\xff" * 8, b"PK\x03\x04", pickle.dumps(Marker()), chance.randbytes(100)]
        )
    elif kind == 3:
        del project.files[path]
    elif kind == 4:
        del project.files[path]
        project.links[path] = chance.choice(
            ["../../secret.safetensors", "/dev/zero", "/dev/null", "..", Path(path).name, "nothing", "/etc/passwd"]
        )
    elif kind == 5:
        del project.files[path]
        project.files[f"{path}/inside"] = b"x"
    elif kind == 6:
        first, last = project.shards()[0], project.shards()[-1]
        project.files[first], project.files[last] = project.files[last], project.files[first]
    elif kind == 7:
        name = chance.choice(["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"])
        project.files.pop(f"source/{name}", None)
        project.links[f"source/{name}"] = chance.choice(
            ["../../secret.json", "/dev/zero", "..", name, "nothing", "/proc/self/environ"]
        )
    elif kind == 8:
        name = chance.choice(
            [
                "pytorch_model.bin",
                "model.pt",
                "extra.py",
                "a.txt",
                "\x1b[31m.txt",
                "n" * 250,
                "é.md",
                "journal.json",
                ".hidden",
            ]
        )
        project.files[f"source/{name}"] = (
            pickle.dumps(Marker()) if chance.random() < 0.7 else b"x" * chance.choice((0, 10, 10**6))
        )
        if chance.random() < 0.3:
            project.files.pop(f"source/{name}")
            project.links[f"source/{name}"] = chance.choice(["../../secret.json", "/dev/zero", "/etc/passwd", ".."])
    else:
        # Pickled weights alone, as old checkpoints have them.
        for name in [*project.shards(), INDEX]:
            project.files.pop(name, None)
        project.files["source/pytorch_model.bin"] = pickle.dumps(Marker())
        project.files["source/pytorch_model.bin.index.json"] = b'{"weight_map": {"a": "pytorch_model.bin"}}'


def index(project: Project, chance: random.Random) -> None:
    value = project.json(INDEX)
    mapping = dict(value.get("weight_map", {})) if isinstance(value, dict) else {}
    kind = chance.randrange(8)
    tensor = chance.choice(list(mapping) or ["x"])
    if kind <= 1:
        mapping[tensor] = chance.choice([*SHARDS, *(Path(path).name for path in project.shards()), odd(chance)])
        if mapping[tensor] == "link.safetensors":
            project.links["source/link.safetensors"] = chance.choice(
                ["../../secret.safetensors", "model-00001-of-00002.safetensors"]
            )
    elif kind == 2:
        mapping.pop(tensor, None)
    elif kind == 3:
        mapping[chance.choice(NAMES)] = chance.choice([*mapping.values(), *SHARDS])
    elif kind == 4:
        text = json.dumps({"weight_map": mapping})
        extra = f"{json.dumps(tensor)}: {json.dumps(chance.choice([*SHARDS, *mapping.values()]))}"
        project.files[INDEX] = (f"{text[:-2]}, {extra}}}}}" if mapping else text).encode()
        return
    elif kind == 5:
        project.files[INDEX] = any_bytes(project.files.get(INDEX, b"{}"), chance)
        return
    elif kind == 6:
        mapping |= {f"t{number}": chance.choice(SHARDS) for number in range(chance.choice((10, 30_000)))}
    else:
        project.files[INDEX] = dump(change_inside(value, chance), chance)
        return
    project.files[INDEX] = dump(
        {"metadata": odd(chance) if chance.random() < 0.2 else {}, "weight_map": mapping}, chance
    )


def config(project: Project, chance: random.Random) -> None:
    value = project.json(CONFIG)
    if not isinstance(value, dict):
        value = {}
    kind = chance.randrange(12)
    key = chance.choice(CONFIG_KEYS)
    if kind <= 5:
        value[key] = odd(chance)
    elif kind == 6:
        value.pop(chance.choice(list(value) or ["x"]), None)
    elif kind == 7:
        value[chance.choice(["rope_parameters", "rope_scaling"])] = chance.choice(ROPE)
        if chance.random() < 0.5:
            value["partial_rotary_factor"] = chance.choice([0, 0.5, 1, 2, -1, 10**12, "x", None])
    elif kind == 8:
        project.files[CONFIG] = any_bytes(project.files.get(CONFIG, b"{}"), chance)
        return
    elif kind == 9:
        deep: Any = 1
        for _ in range(chance.choice((50, 150, 900, 3000))):
            deep = [deep] if chance.random() < 0.5 else {"a": deep}
        try:
            value[chance.choice(["deep", key])] = deep
            project.files[CONFIG] = json.dumps(value).encode()
        except RecursionError:
            project.files[CONFIG] = b'{"a":' * 3000 + b"1" + b"}" * 3000
        return
    elif kind == 10:
        text = json.dumps(value)
        project.files[CONFIG] = (
            f"{text[:-1]}, {json.dumps(key)}: {chance.choice([*RAW, json.dumps(odd(chance))])}}}".encode()
        )
        return
    else:
        value = change_inside(value, chance)
    project.files[CONFIG] = dump(value, chance)
    project.awq = project.awq or chance.random() < 0.3


def data(project: Project, chance: random.Random) -> None:
    """Other values in the tensors: NaN, infinities, zeros, noise."""
    path = chance.choice(project.shards())
    content = bytearray(project.files[path])
    begin = min(8 + int.from_bytes(content[:8], "little"), len(content))
    size = chance.choice((1, 4, 1000, 100_000))
    at = chance.randrange(begin, len(content) + 1)
    fill = chance.choice([b"\x00", b"\xff", b"\x7f", b"\x80", b"\x7e", None])
    end = min(at + size, len(content))
    content[at:end] = chance.randbytes(end - at) if fill is None else fill * (end - at)
    project.files[path] = bytes(content)
    project.awq = project.awq or chance.random() < 0.2


def tokenizer(project: Project, chance: random.Random) -> None:
    path = "source/" + chance.choice(
        [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "config.json",
            "chat_template.jinja",
        ]
    )
    content = project.files.get(path, b"{}")
    kind = chance.randrange(6)
    value = project.json(path)
    if kind == 0:
        content = any_bytes(content, chance)
    elif kind == 1:
        content = chance.choice([b"", b"null", b"[]", b"{}", b"5", b"\xff\xfe", b"[" * 100_000, pickle.dumps(Marker())])
    elif kind == 2 and isinstance(value, dict):
        value["auto_map"] = chance.choice(
            [
                {"AutoTokenizer": ["code.Evil", None]},
                {"AutoTokenizer": "code.Evil", "AutoConfig": "code.Evil"},
                {"AutoTokenizer": "owner/repo--code.Evil"},
                odd(chance),
            ]
        )
        value["tokenizer_class"] = chance.choice(["Evil", "os.system", "PreTrainedTokenizerFast", odd(chance)])
        project.files["source/code.py"] = (
            b"import pathlib\npathlib.Path('outside/imported').touch()\nclass Evil: pass\n"
        )
        content = json.dumps(value).encode()
    elif isinstance(value, dict):
        if kind == 3:
            keys = [
                "chat_template",
                "bos_token",
                "extra_special_tokens",
                "model_max_length",
                "tokenizer_class",
                "added_tokens_decoder",
                "padding_side",
                "clean_up_tokenization_spaces",
                "additional_special_tokens",
                "backend",
                "model_input_names",
                "name_or_path",
                "tokenizer_file",
                "vocab_file",
            ]
            value[chance.choice(keys)] = chance.choice(
                [odd(chance), "/etc/passwd", {"content": odd(chance)}, {"1": {"content": odd(chance)}}]
            )
            content = json.dumps(value).encode()
        else:
            content = dump(change_inside(value, chance), chance)
    project.files[path] = content
    project.awq = True


def template(project: Project, chance: random.Random) -> None:
    project.files["samples.jsonl"] = project.files["chats.jsonl"]
    text = chance.choice(TEMPLATES)
    if chance.random() < 0.3:
        text = any_bytes(project.files["source/chat_template.jinja"], chance).decode(errors="replace")
    project.files["source/chat_template.jinja"] = text.encode(errors="replace")
    project.awq = True


def samples(project: Project, chance: random.Random) -> None:
    lines = project.text("samples.jsonl").split("\n")
    at = chance.randrange(len(lines))
    lines[at] = chance.choice(
        [
            any_bytes(lines[at].encode(), chance).decode(errors="replace"),
            json.dumps({"text": odd(chance)}),
            json.dumps({"messages": odd(chance)}),
            '{"text": "\\ud800 x"}',
            '{"text": "a", "language": "\\ud800\\u001b[31m"}',
            "[" * 100_000,
            "1" * 5000,
            json.dumps(odd(chance)),
        ]
    )
    project.files["samples.jsonl"] = (
        any_bytes("\n".join(lines).encode(errors="replace"), chance)
        if chance.random() < 0.3
        else "\n".join(lines).encode(errors="replace")
    )
    project.awq = True


def recipe(project: Project, chance: random.Random) -> None:
    text = project.text("recipe.yaml")
    kind = chance.randrange(5)
    if kind == 0:
        project.files["recipe.yaml"] = any_bytes(text.encode(), chance)
    elif kind == 1:
        lines = [line for line in text.split("\n") if ":" in line]
        at = chance.choice(lines) if lines else "x:"
        project.files["recipe.yaml"] = text.replace(at, f"{at.partition(':')[0]}: {chance.choice(YAML)}", 1).encode(
            errors="replace"
        )
    elif kind == 2 and "*" not in text:  # aliases of an earlier change would fill this process's own memory
        try:
            project.files["recipe.yaml"] = yaml.safe_dump(change_inside(yaml.safe_load(text), chance)).encode()
        except (yaml.YAMLError, ValueError, RecursionError):
            project.files["recipe.yaml"] = text.encode()
    elif kind == 3:
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
        merge = "a0: &a0 {x: 1}\n" + "".join(
            f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)
        )
        many = "".join(f"k{number}: 1\n" for number in range(20_000))
        project.files["recipe.yaml"] = (
            chance.choice([bomb, merge, many, ""]) + text + f"\nmore: {chance.choice(YAML)}\n"
        ).encode(errors="replace")
    else:
        project.overrides += [
            "--set",
            f"{chance.choice(OVERRIDES)}={chance.choice([*YAML, *map(str, ODD)])}".replace("\0", ""),
        ]


CATEGORIES: dict[str, tuple[Mutation, int]] = {
    "header bytes": (header_bytes, 8), "header bytes, length right": (header_bytes_of_right_length, 10),
    "header length": (header_length, 4), "header whole": (header_whole, 5), "header entries": (header_json, 18),
    "header metadata": (header_metadata, 3), "names twice": (header_twice, 5), "names": (names, 9),
    "files and links": (files, 6), "index": (index, 9), "config.json": (config, 14), "data": (data, 2),
    "tokenizer": (tokenizer, 2), "chat template": (template, 0.7), "samples": (samples, 1), "recipe": (recipe, 5),
}  # fmt: skip


def base_project(folder: Path) -> dict[str, bytes]:
    """The content of the valid project that every input starts from."""
    write_checkpoint(folder / "source", SIZES, shards=2, shuffle=True)
    write_samples(folder / "mixed.jsonl", 2 * SAMPLES)
    lines = (folder / "mixed.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in (("samples", lines[::2]), ("chats", lines[1::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    content = {
        "model": {"source": "source"},
        "work_dir": "run",
        "awq": {
            "calibration": {"files": [{"path": "samples.jsonl", "samples": SAMPLES}], "sequence_length": 16},
            "n_grid": 3,
            "min_tokens": 8,
            "device": "cpu",
            "memory_budget": "64MiB",
        },
        "workers": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_input(base: dict[str, bytes], seed: int, number: int) -> tuple[str, Project, random.Random]:
    """Input `number`: its category (that of the last change), itself, and the chance that goes on with it."""
    chance = random.Random(f"{seed}:{number}")
    project = Project(dict(base))
    weights = [weight for _, weight in CATEGORIES.values()]
    category = ""
    for _ in range(chance.choices((1, 2, 3), (7, 2, 1))[0]):
        if not project.shards():
            break
        category = chance.choices(list(CATEGORIES), weights)[0]
        CATEGORIES[category][0](project, chance)
    project.awq = project.awq or chance.random() < AWQ_SHARE
    return category, project, chance


def write_input(project: Project, folder: Path) -> None:
    (folder / "outside").mkdir(parents=True)
    (folder / "outside" / "sentinel").write_text("untouched", encoding="utf-8")
    (folder / "secret.json").write_text('{"secret": 1}', encoding="utf-8")
    (folder / "secret.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    inside = folder / "project"
    for path, content in project.files.items():
        target = inside / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for path, target_name in project.links.items():
        link = inside / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.is_symlink() or link.exists()):
            link.symlink_to(target_name)


def work_dir_of(project: Project, folder: Path) -> Path:
    """Where the recipe, changed as it may be, lets mmq write."""
    try:
        return load(folder / "project" / "recipe.yaml", project.overrides[1::2]).work_path
    except RecipeError:
        return folder / "project" / "run"


def listing(folder: Path, but: Path) -> dict[str, tuple[int, int, str]]:
    """All below a folder but one: size, time of change, and digest."""
    found = {}
    for parent, folders, names_ in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) != but]
        for name in (*folders, *names_):
            path = os.path.join(parent, name)  # noqa: PTH118
            stat = os.lstat(path)
            digest = ""
            if os.path.isfile(path) and not os.path.islink(path):  # noqa: PTH113, PTH114
                digest = xxhash.xxh3_128_hexdigest(Path(path).read_bytes())
            found[path] = (stat.st_size, stat.st_mtime_ns, digest) if digest else (0, 0, digest)
    return found


# How many of an audit event's first arguments are paths that it changes, and what no input may bring about.
CHANGES = {
    "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1,
}  # fmt: skip
NEVER = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class"}


class Watch:
    """An audit hook: what this process may not do while an input is at work."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if (mode is not None and set(mode) & set("wax+")) or (mode is None and flags & writes):
                self._path(event, path)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                self._path(event, path)
        elif event in NEVER or (event == "subprocess.Popen" and "mmq.source.chat_template" not in arguments[1]):
            self.seen.append(f"{event} {arguments!r:.200}")

    def _path(self, event: str, path: Any) -> None:
        if isinstance(path, int) or self.root is None:
            return
        name = os.fsdecode(path)
        real = str(Path(name).parent.resolve() / Path(name).name)
        if real != self.root and not real.startswith(self.root + "/") and real != "/dev/null":
            self.seen.append(f"{event} {name}")


def memory(name: str) -> int:
    """A figure of this process in bytes: VmRSS, VmHWM or VmSize."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def run_commands(project: Project, inside: Path) -> tuple[str, str]:
    """(outcome, detail): `success`, `refused by ...` and what it said, or a failure."""
    path = str(inside / "recipe.yaml")
    commands = [["run", path, "--dry-run"], ["plan", path], ["dequant", path, "--quiet"]]
    later = [["awq", path, "--set", "awq.source=fp8"], ["restore", path, "--quiet"], ["verify", path, "--json"]]
    done = "success", ""
    for command in commands + (later if project.awq else []):
        result = CliRunner().invoke(app, command + project.overrides)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            trace = "".join(traceback.format_exception(result.exception)[-3:])
            return "exception", f"{command[0]}: {trace[-1500:]}"
        if result.exit_code == 0:
            continue
        message = result.stderr
        if result.exit_code != 2:
            return "exit code", f"{command[0]} exits {result.exit_code}: {message[:500]}"
        if message.count("\n") != 1 or not message.startswith("error: ") or not message[:-1].isprintable():
            return "message", f"{command[0]}: {message[:500]!r}"
        if len(message) > 5000:
            return "message", f"{command[0]} says {len(message)} characters: {message[:200]!r}"
        done = f"refused by {command[0]}", message.strip()
        if command[0] != "plan":  # which asks for less, and for more, than the stages
            break
    return done


def judge(base: dict[str, bytes], seed: int, number: int, scratch: Path, watch: Watch) -> tuple[str, str, str]:
    """(category, outcome, detail) of one input."""
    category, project, _ = make_input(base, seed, number)
    folder = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=scratch))
    try:
        write_input(project, folder)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        resident = memory("VmRSS")
        os.chdir(folder)
        watch.seen.clear()
        work_dir = work_dir_of(project, folder)
        before = listing(folder, work_dir)
        watch.root = str(work_dir)
        try:
            outcome, detail = run_commands(project, folder / "project")
        finally:
            watch.root = None
            os.chdir(scratch)
        grown = memory("VmHWM") - resident
        changed = {path for path, entry in (before.items() ^ listing(folder, work_dir).items())}
        if watch.seen:
            return category, "forbidden", "; ".join(watch.seen[:5])
        if changed:
            return category, "write outside", ", ".join(sorted(changed)[:5])
        if grown > MEMORY:
            return category, "memory", f"{grown / 2**20:.0f} MiB more than before ({outcome})"
        return category, outcome, detail
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work(connection: Connection, base: dict[str, bytes], seed: int, numbers: list[int], scratch: Path) -> None:
    """A child: judge the inputs one after the other and tell of each before and after."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = Watch()
    for number in numbers:
        connection.send((number, None))
        connection.send((number, judge(base, seed, number, scratch, watch)))


class Pool:
    """Children that take batches of inputs; one that dies or hangs costs one input, and the rest goes to another."""

    def __init__(self, base: dict[str, bytes], seed: int, scratch: Path) -> None:
        self.base, self.seed, self.scratch = base, seed, scratch
        self.context = multiprocessing.get_context("fork")

    def run(self, numbers: list[int], workers: int, tell: Callable[[int, tuple[str, str, str]], None]) -> None:
        waiting = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)][::-1]
        busy: dict[Connection, tuple[Any, list[int], float]] = {}
        while waiting or busy:
            while waiting and len(busy) < workers:
                part = waiting.pop()
                mine, its = self.context.Pipe(duplex=False)
                child = self.context.Process(target=work, args=(its, self.base, self.seed, part, self.scratch))
                child.start()
                its.close()
                busy[mine] = (child, part, time.monotonic())
            for connection in wait(list(busy), timeout=1.0):
                assert isinstance(connection, Connection)
                child, part, _ = busy[connection]
                try:
                    number, verdict = connection.recv()
                except EOFError:
                    child.join()
                    self._lost(busy.pop(connection), f"died, exit {child.exitcode}", waiting, tell)
                    continue
                busy[connection] = (child, part[1:] if verdict else part, time.monotonic())
                if verdict:
                    tell(number, verdict)
            for connection, (child, _, since) in list(busy.items()):
                if time.monotonic() - since > SECONDS:
                    child.kill()
                    child.join()
                    self._lost(busy.pop(connection), "timeout", waiting, tell)

    def _lost(
        self,
        state: tuple[Any, list[int], float],
        outcome: str,
        waiting: list[list[int]],
        tell: Callable[[int, tuple[str, str, str]], None],
    ) -> None:
        _, left, _ = state
        if left:
            tell(left[0], (make_input(self.base, self.seed, left[0])[0], outcome, ""))
            if left[1:]:
                waiting.append(left[1:])


def is_clean(outcome: str) -> bool:
    return outcome == "success" or outcome.startswith("refused")


def is_late(outcome: str) -> bool:
    """Whether a stage refused what the checks before the first byte had taken."""
    return outcome.startswith("refused") and not outcome.endswith((" run", " plan"))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), key=lambda item: -item[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--number", type=int, help="judge this input alone and show what becomes of it")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        scratch = Path(name)
        base = base_project(scratch / "base")
        # Once in this process: all is imported before the children are forked, and the unchanged project must do.
        clean = Project(dict(base), awq=True)
        write_input(clean, scratch / "clean")
        outcome, detail = run_commands(clean, scratch / "clean" / "project")
        if outcome != "success":
            print(f"the unchanged project: {outcome} {detail}", file=sys.stderr)
            return 1
        counts: Counter[tuple[str, str]] = Counter()
        failures: list[tuple[int, tuple[str, str, str]]] = []
        late: list[tuple[int, tuple[str, str, str]]] = []

        def tell(number: int, verdict: tuple[str, str, str]) -> None:
            category, outcome, detail = verdict
            counts[category, outcome] += 1
            if is_late(outcome):
                late.append((number, verdict))
            if not is_clean(outcome):
                failures.append((number, verdict))
                print(
                    f"FAILURE --seed {arguments.seed} --number {number} ({category}): {outcome} {detail}",
                    file=sys.stderr,
                )
            if counts.total() % 1000 == 0:
                print(f"{counts.total()} inputs, {len(failures)} failures", file=sys.stderr)

        numbers = [arguments.number] if arguments.number is not None else list(range(arguments.inputs))
        Pool(base, arguments.seed, scratch).run(numbers, arguments.workers, tell)
    outcomes = Counter[str]()
    for (_, outcome), count in counts.items():
        outcomes[outcome] += count
    categories = {
        category: {outcome: counts[category, outcome] for outcome in outcomes if counts[category, outcome]}
        for category in CATEGORIES
    }
    seconds = round(time.monotonic() - begin)
    if arguments.json:
        print(
            json.dumps(
                {
                    "inputs": counts.total(),
                    "seconds": seconds,
                    "outcomes": outcomes,
                    "categories": categories,
                    "failures": failures,
                    "late": late,
                }
            )
        )
    else:
        for category, found in categories.items():
            print(f"{category}: {sum(found.values())} ({_listed(found)})")
        for number, (category, outcome, detail) in late:
            print(f"late --number {number} ({category}): {outcome}: {detail}")
        print(f"{counts.total()} inputs in {seconds} s: {_listed(outcomes)}; {len(late)} refused late")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
