"""Checkpoints that were made to do harm: refused in one sentence or harmless, in bounded time and memory, and nothing
that they bring along is ever run unless the recipe says so. `scripts/fuzz_checkpoint.py` searches for more of them."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import mmq.source.chat_template
from cli.test_cli import cli, refused, succeed
from conftest import edit_json
from mmq.errors import CalibrationError, CheckpointError, RecipeError, printable, shown
from mmq.families.minimax_m2 import MINIMAX_M2
from mmq.recipe import load
from mmq.source.calibration import inputs_fingerprint
from mmq.source.chat_template import Chat, render
from mmq.storage.atomic import write_json
from mmq.storage.checkpoint import INDEX_NAME, LONGEST_NAME, Checkpoint, read_json
from mmq.storage.shards import DTYPES
from storage.test_storage import edit_tensors

BOUNDED = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DATA = bytes(range(40))
# Three tensors in 40 bytes.
HEADER: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [16, 32]},
    "c": {"dtype": "U8", "shape": [8], "data_offsets": [32, 40]},
}
ESCAPE = "\x1b[31m"


def folder_of(path: Path, header: bytes, data: bytes = DATA, length: int | None = None) -> Path:
    """A checkpoint of one shard with this header."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    size = len(header) if length is None else length
    (path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)
    (path / "config.json").write_text("{}", encoding="utf-8")
    return path


def outcome(folder: Path) -> Checkpoint | str:
    """The opened checkpoint, or the sentence that refuses it; nothing else may come out."""
    try:
        return Checkpoint.open(folder)
    except CheckpointError as error:
        assert len(str(error)) < 3000
        return str(error)


def is_valid(header: Any, size: int) -> bool:
    """The format's rules in its own words: every entry whole, all bytes taken once and in order, no gap, no overlap."""
    if not isinstance(header, dict):
        return False
    spans = []
    for name, entry in header.items():
        if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
            return False
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                return False
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            return False
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            return False
        if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 2**64 for side in shape):
            return False
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
            return False
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            return False
        spans.append(tuple(offsets))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            return False
        position = end
    return position == size


SIDES = st.sampled_from([-1, 0, 1, 2, 4, 8, 16, 2**31, 2**62, 2**63, 2**64, 0.5, True, None, "2", [2]])
ENTRY_CHANGES = st.one_of(
    st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "U8", "I8", "F64", "f32", "Q4", "", 5, None])}),
    st.fixed_dictionaries({"shape": st.lists(SIDES, max_size=3) | st.sampled_from([None, 5, "x", {}, [1] * 500])}),
    st.fixed_dictionaries(
        {"data_offsets": st.lists(st.integers(-1, 41) | st.sampled_from([2**63, 2**64, 1.0, "0", None]), max_size=3)}
    ),
    st.sampled_from(
        [
            {"dtype": "U8", "shape": [4, 4]},
            {"dtype": "I8", "shape": [8]},
            {"shape": [16, 1, 0], "data_offsets": [40, 40]},
        ]
    ),
)
NAMES = st.sampled_from(["a", "b", "c", "d", "", "../d", "a/b", "x\x00", ESCAPE, "‮", "ä", "n" * 1001, "__metadata__"])


@BOUNDED
@given(
    changes=st.lists(st.tuples(st.sampled_from("abc"), ENTRY_CHANGES), max_size=2),
    renames=st.dictionaries(st.sampled_from("abc"), NAMES, max_size=1),
    size=st.sampled_from([40, 40, 40, 40, 39, 41, 0]),
)
def test_a_header_is_taken_only_if_it_keeps_the_formats_rules(
    tmp_path: Path, changes: list[tuple[str, dict[str, Any]]], renames: dict[str, str], size: int
) -> None:
    header = {name: dict(entry) for name, entry in HEADER.items()}
    for name, change in changes:
        header[name] |= change
    header = {renames.get(name, name): entry for name, entry in header.items()}
    found = outcome(folder_of(tmp_path / "x", json.dumps(header).encode(), DATA[:size] + b"\0" * (size - 40)))
    if isinstance(found, str):
        assert printable(found) == found
        assert not is_valid(header, size)
        return
    assert is_valid(header, size)
    assert {name: (spec.dtype, list(spec.shape)) for name, spec in found.specs.items()} == {
        name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    }


@BOUNDED
@given(data=st.data())
def test_no_bytes_in_a_headers_place_end_otherwise(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(HEADER).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    length = data.draw(st.sampled_from([None, None, None, 0, 1, 2**31, 2**63, 2**64 - 1, len(content) + 1]))
    outcome(folder_of(tmp_path / "x", bytes(content), length=length))


@BOUNDED
@given(
    weight_map=st.dictionaries(
        NAMES | st.sampled_from("abc"),
        st.sampled_from(
            ["1.safetensors", "2.safetensors", "../2.safetensors", "./2.safetensors", "/etc/passwd", "3.safetensors",
            "..",
             "2.bin", "link.safetensors", "a\x00.safetensors", f"{ESCAPE}.safetensors", "", 5, None, ["1.safetensors"]]
        ),
        max_size=4,
    )
)  # fmt: skip
def test_an_index_is_taken_only_if_it_is_true(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    folder = tmp_path / "x"
    if not folder.exists():
        folder.mkdir()
        save_file({"a": torch.ones(2), "b": torch.zeros(1)}, folder / "1.safetensors")
        save_file({"c": torch.ones(3)}, folder / "2.safetensors")
        save_file({"c": torch.ones(3)}, tmp_path / "2.safetensors")
        (folder / "link.safetensors").symlink_to(tmp_path / "2.safetensors")
        (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    found = outcome(folder)
    true = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    if isinstance(found, str):
        assert not weight_map or not weight_map.items() <= true.items() or len(weight_map) == 1 or "a" not in weight_map
    else:
        assert weight_map.items() <= true.items()
        assert {name: found.shard_of(name) for name in found.specs} == weight_map


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@BOUNDED
@given(
    value=st.dictionaries(st.sampled_from(["a", "b", "\ud800"]), JSON, max_size=3),
    depth=st.sampled_from([0, 1, 90, 98, 200]),
)
def test_what_read_json_takes_can_be_written_again(tmp_path: Path, value: dict[str, Any], depth: int) -> None:
    """A NaN, half a character or absurd depth would else end a run after its hours of work, at its last file."""
    text = json.dumps(value)
    text = '{"x": ' * depth + text + "}" * depth
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    try:
        found = read_json(tmp_path / "config.json")
    except CheckpointError:
        assert depth > 90 or any(word in text for word in ("NaN", "Infinity", "\\ud"))
        return
    write_json(tmp_path / "again.json", found)
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == found


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS: dict[str, bytes] = {
    "overlap": json.dumps({"a": entry(0, 24), "b": entry(16, 40)}).encode(),
    "the same bytes twice": json.dumps({"a": entry(0, 40), "b": entry(0, 40)}).encode(),
    "hole": json.dumps({"a": entry(0, 16), "b": entry(24, 40)}).encode(),
    "hole at the front": json.dumps({"a": entry(8, 40)}).encode(),
    "bytes left over": json.dumps({"a": entry(0, 32)}).encode(),
    "reversed": json.dumps({"a": entry(40, 0, shape=[40])}).encode(),
    "beyond the file": json.dumps({"a": entry(0, 48)}).encode(),
    "product of 2^64": json.dumps({"a": entry(0, 40, shape=[2**32, 2**32])}).encode(),
    "product of 2^64 and 40": json.dumps({"a": entry(0, 40, shape=[2**61 + 5, 8])}).encode(),
    "side of 2^63": json.dumps({"a": entry(0, 40, shape=[2**63])}).encode(),
    "unknown dtype": json.dumps({"a": entry(0, 40, "U9")}).encode(),
    "a dtype that mmq does not read": json.dumps({"a": entry(0, 40, "F8_E8M0")}).encode(),
    "control characters": json.dumps({f"a{ESCAPE}": entry(0, 40)}).encode(),
    "a line break": json.dumps({"a\nerror: b": entry(0, 40)}).encode(),
    "empty name": json.dumps({"": entry(0, 40)}).encode(),
    "name of a megabyte": json.dumps({"n" * 10**6: entry(0, 40)}).encode(),
    "half a character": b'{"\\ud800": {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]}}',
    "metadata that is no text": json.dumps({"__metadata__": {"a": 1}, "a": entry(0, 40)}).encode(),
    "deep": b'{"a":' * 100_000,
    "UTF-16": json.dumps({"a": entry(0, 40)}).encode("utf-16"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_hostile_header_is_refused(tmp_path: Path, fault: str) -> None:
    found = outcome(folder_of(tmp_path / "x", HEADERS[fault]))
    assert isinstance(found, str)
    assert "model.safetensors" in found
    assert printable(found) == found


@pytest.mark.parametrize("length", [0, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_is_not_believed(tmp_path: Path, length: int) -> None:
    header = json.dumps(HEADER).encode()
    assert "damaged or truncated" in str(outcome(folder_of(tmp_path / "x", header, length=length)))


TWICE = {
    "the same": (entry(0, 40), entry(0, 40), True),
    "another dtype first": (entry(0, 40, "F32", [10]), entry(0, 40), True),
    "another dtype last": (entry(0, 40), entry(0, 40, "F32", [10]), True),
    "other bytes first": (entry(0, 16), entry(16, 40), False),
    "all bytes last": (entry(0, 16), entry(0, 40), True),
    "all bytes first": (entry(0, 40), entry(0, 16), False),
}


@pytest.mark.parametrize("case", TWICE)
def test_a_name_given_twice_has_one_meaning(tmp_path: Path, case: str) -> None:
    """The last one holds, for the header's rules, the tensors and `read_ahead` alike; what that leaves is checked."""
    first, last, taken = TWICE[case]
    folder = folder_of(tmp_path / "x", f'{{"a": {json.dumps(first)}, "a": {json.dumps(last)}}}'.encode())
    found = outcome(folder)
    if not taken:
        assert "damaged or truncated" in str(found)
        return
    assert isinstance(found, Checkpoint)
    assert (found.specs["a"].dtype, list(found.specs["a"].shape)) == (last["dtype"], last["shape"])
    with found.reader() as reader:
        assert reader["a"].numpy().tobytes() == DATA
        assert torch.equal(reader["a"], load_file(folder / "model.safetensors")["a"])
    found.read_ahead(["a"])


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "tokenizer.json", "generation_config.json"])
def test_no_small_file_comes_from_outside_the_folder(project: Path, name: str) -> None:
    """What a link shows would be copied into the output, or `/dev/zero` be read to its end."""
    path = project / "source" / name
    path.rename(project / "outside")
    path.symlink_to(project / "outside")
    assert f"{name} is a link that leads out of its folder" in refused("dequant", project / "recipe.yaml")
    if name in ("config.json", INDEX_NAME):
        path.unlink()
        path.symlink_to("/dev/zero")
        assert f"{name} is a link that leads out of its folder" in refused("run", project / "recipe.yaml")


def test_a_pipe_is_no_config(project: Path) -> None:
    (project / "source" / "config.json").unlink()
    os.mkfifo(project / "source" / "config.json")
    assert "config.json is no plain file" in refused("dequant", project / "recipe.yaml")


def test_nothing_of_a_file_reaches_the_terminal_raw(project: Path) -> None:
    """Names are refused where they are met, and what else a message quotes is escaped."""
    edit_json(project / "source" / "config.json", lambda config: config.update(model_type=ESCAPE, architectures=[]))
    message = refused("dequant", project / "recipe.yaml")
    assert "\\x1b[31m" in message
    odd = f"so{ESCAPE}urce\u202e"
    escaped = odd.encode("unicode_escape").decode()
    message = refused("dequant", project / "recipe.yaml", "--set", f'model.source="./{escaped}"')
    assert message.isprintable()
    assert escaped in message


@pytest.mark.parametrize(
    "name",
    ["model.layers.00.x", "model.layers.٣.x", "model.layers.+1.x", "model.layers.-1.x", "model.layers.1_0.x",
     "model.layers." + "9" * 5000 + ".x", "mоdel.layers.1.x"],
)  # fmt: skip
def test_a_layers_number_has_one_spelling(name: str) -> None:
    """Two names for one tensor would let the second replace the first."""
    assert MINIMAX_M2.split(name) == (None, name)
    assert MINIMAX_M2.split("model.layers.10.x") == (10, "x")
    expert = "block_sparse_moe.experts.{}.w1.weight"
    assert MINIMAX_M2.split_expert(expert.format("7")) == (7, "w1", "weight")
    for number in ("07", "٧", "9" * 5000):
        assert MINIMAX_M2.split_expert(expert.format(number)) is None


# Absurd sizes: a process that may take 256 MiB more than it has refuses them all.

ABSURD = [
    {key: value}
    for value in (10**12, 2**63, 10**30)
    for key in (
        "num_hidden_layers", "num_local_experts", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rotary_dim", "num_experts_per_tok", "vocab_size",
    )
] + [
    {"num_hidden_layers": 2**40, "num_local_experts": 2**40},
    {"hidden_size": 2**40, "intermediate_size": 2**40, "head_dim": 2**40},
    {"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 10**9},
]  # fmt: skip
REFUSE_ALL = """
import json, resource, sys
from pathlib import Path
from mmq.families.registry import architecture_of
from mmq.errors import CheckpointError
from mmq.source.model import SourceModel
from mmq.storage.checkpoint import Checkpoint
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for change in json.load(sys.stdin):
    (folder / "config.json").write_text(json.dumps(config | change))
    try:
        checkpoint = Checkpoint.open(folder)
        SourceModel(checkpoint, architecture_of(checkpoint.config))
        print("taken")
    except CheckpointError as error:
        print("refused", error)
"""


def test_absurd_sizes_are_refused_before_anything_is_allocated(project: Path) -> None:
    command = [sys.executable, "-c", REFUSE_ALL, str(project / "source")]
    result = subprocess.run(command, input=json.dumps(ABSURD), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == len(ABSURD)
    for change, answer in zip(ABSURD, answers, strict=True):
        assert answer.startswith("refused "), change
        assert "config.json" in answer or "has the shape" in answer


def config(**values: Any) -> Callable[[Path], None]:
    return lambda project: edit_json(project / "source" / "config.json", lambda content: content.update(values))


ROTARY: dict[str, tuple[Callable[[Path], None], str]] = {
    "share above 1": (config(rotary_dim=None, partial_rotary_factor=10**12), "partial_rotary_factor is 1000000000000"),
    "negative share": (config(rotary_dim=None, partial_rotary_factor=-1), "partial_rotary_factor is -1"),
    "parameters are a list": (config(rope_parameters=[1]), "rope_parameters"),
    "unknown kind": (config(rope_parameters={"rope_type": "nonsense"}), "rope_type is 'nonsense'; known are"),
    "kind is a list": (config(rope_parameters={"rope_type": []}), "rope_type is []; known are"),
    "activation is a list": (config(hidden_act=[]), "hidden_act"),
    "epsilon is a word": (config(rms_norm_eps="x"), "rms_norm_eps"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ROTARY)
def test_odd_values_for_transformers_are_refused(project: Path, fault: str) -> None:
    change, message = ROTARY[fault]
    change(project)
    assert message in refused("awq", project / "recipe.yaml", "--set", "awq.source=fp8")
    assert not (project / "run" / "awq" / INDEX_NAME).exists()


def source_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda project: edit_tensors(project / "source", lambda all_: all_.update({name: change(all_[name])}))


NORM = "model.layers.1.self_attn.k_norm.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1"
TENSORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a norm as a column": (source_tensor(NORM, lambda t: t[:, None]), f"{NORM} has the shape [128, 1]"),
    "a norm of one": (source_tensor(NORM, lambda t: t[:1].clone()), f"{NORM} has the shape [1]"),
    "a norm in fp16": (source_tensor(NORM, lambda t: t.half()), f"{NORM} is F16 instead of BF16"),
    "a router of integers": (source_tensor(ROUTER, lambda t: t.int()), f"{ROUTER} is I32 instead of BF16 or F32"),
    "embeddings in fp32": (
        source_tensor("model.embed_tokens.weight", lambda t: t.float()),
        "model.embed_tokens.weight is F32 instead of BF16",
    ),
    "a final norm of bytes": (
        source_tensor("model.norm.weight", lambda t: t.view(torch.uint8)),
        "model.norm.weight is U8 instead of BF16",
    ),
    "a head that is a row": (
        source_tensor("lm_head.weight", lambda t: t.reshape(-1)),
        "lm_head.weight has the shape [131072]",
    ),
    "embeddings of another width": (
        source_tensor("model.embed_tokens.weight", lambda t: t[:, :128].contiguous()),
        "model.embed_tokens.weight has the shape [512, 128]",
    ),
    "attention of no layer": (
        lambda project: edit_tensors(
            project / "source",
            lambda all_: all_.update({"model.layers.٠.self_attn.q_proj.weight": torch.ones(4).bfloat16()}),
        ),
        "model.layers.٠.self_attn.q_proj.weight lies outside the decoder layers",
    ),
    "an expert's bias": (
        lambda project: edit_tensors(project / "source", lambda all_: all_.update({f"{EXPERT}.bias": torch.ones(4)})),
        f"{EXPERT}.bias is neither an expert's weight nor its scale",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_no_layer_could_compute_with_are_refused_first(project: Path, fault: str) -> None:
    """Not after hours, when their layer comes."""
    change, message = TENSORS[fault]
    change(project)
    assert message in refused("run", project / "recipe.yaml", "--dry-run")


@pytest.mark.parametrize("command", ["calibration", "awq"])
def test_labels_without_end_are_not_counted_out(project: Path, command: str) -> None:
    """transformers makes a name for each label that a config.json speaks of, whatever the model."""
    config(num_labels=2**64)(project)
    message = refused(command, project / "recipe.yaml", "--set", "awq.source=fp8")
    assert "num_labels is 18446744073709551616, more than" in message


# Code and pickles


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


COMMANDS = ("plan", "calibration", "dequant", "awq", "restore", "run", "status", "verify", "eval")


def test_pickled_weights_are_refused_and_never_loaded(project: Path) -> None:
    marker = project / "unpickled"
    content = pickle.dumps(Touch(marker))
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    source = project / "source"
    for path in [*source.glob("*.safetensors"), source / INDEX_NAME]:
        path.unlink()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin"):
        (source / name).write_bytes(content)
    edit_json_or_write(source / "pytorch_model.bin.index.json", {"weight_map": {"a": "pytorch_model.bin"}})
    for command in COMMANDS:
        result = cli(command, project / "recipe.yaml")
        assert result.exit_code == (0 if command in ("plan", "calibration") else 2), (command, result.output)
        assert not marker.exists()
    assert "only safetensors are read" in refused("dequant", project / "recipe.yaml")


def edit_json_or_write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class OwnConfig(PretrainedConfig): model_type = "minimax_m2"
class OwnModel(PreTrainedModel): pass
class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__("<bos>" + text, **options)
"""


def bring_code(project: Path, tokenizer: bool) -> Path:
    """Python in the source that config.json, and the tokenizer's on demand, ask to run; the file it makes if it is."""
    marker = project / "imported"
    (project / "source" / "own_code.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    edit_json(project / "source" / "config.json", lambda content: content.update(auto_map=classes))
    if tokenizer:
        edit_json(
            project / "source" / "tokenizer_config.json",
            lambda content: content.update(
                auto_map={"AutoTokenizer": [None, "own_code.OwnTokenizer"]}, tokenizer_class="OwnTokenizer"
            ),
        )
    return marker


def test_a_checkpoints_code_and_pickles_are_never_loaded(project: Path) -> None:
    """As MiniMax-M2 itself has it: auto_map names modeling code, which is carried along as a file. Pickles are not."""
    marker, unpickled = bring_code(project, tokenizer=False), project / "unpickled"
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.pkl")
    for name in names:
        (project / "source" / name).write_bytes(pickle.dumps(Touch(unpickled)))
    recipe = project / "recipe.yaml"
    succeed("run", recipe, "--quiet", "--set", "awq.n_grid=3")
    for command in ("calibration", "status", "plan", "verify"):
        succeed(command, recipe, "--set", "awq.n_grid=3")
    held_out = ("--data", project / "samples.jsonl", "--samples", "1", "--sequence-length", "16")
    succeed("eval", recipe, "--quiet", "--set", "awq.n_grid=3", *held_out)
    assert not marker.exists()
    assert not unpickled.exists()
    outputs = [project / "run" / folder for folder in ("bf16", "awq", "hybrid")]
    assert not [name for name in names for folder in outputs if (folder / name).exists()]
    for folder in outputs:
        assert (folder / "own_code.py").read_bytes() == (project / "source" / "own_code.py").read_bytes()


def test_a_tokenizers_code_runs_only_where_the_recipe_trusts_it(project: Path, mmq: Any) -> None:
    recipe = project / "recipe.yaml"
    plain = json.loads(succeed("calibration", recipe, "--json").splitlines()[-1])
    marker = bring_code(project, tokenizer=True)
    result = cli("calibration", recipe)
    if result.exit_code:
        assert "loads without remote code" in result.stderr
    assert not marker.exists()
    environment = os.environ | {"HF_MODULES_CACHE": str(project / "modules")}
    result = mmq("calibration", recipe, "--json", "--set", "model.trust_remote_code=true", env=environment)
    assert result.returncode == 0, result.stderr
    assert marker.exists()
    trusted = json.loads(result.stdout.splitlines()[-1])
    samples = trusted["total"]["samples"]
    assert samples == plain["total"]["samples"]
    # Its own tokenizer puts a token before each sample; kept under another name than any without its code.
    tokens = [found["total"]["tokens"] + found["total"]["tokens_cut"] for found in (plain, trusted)]
    assert tokens[1] == tokens[0] + samples
    code = project / "source" / "own_code.py"
    code.write_text(code.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    loaded = load(recipe, ["model.trust_remote_code=true"])
    samples_file = {project / "samples.jsonl": (project / "samples.jsonl").read_bytes()}
    assert inputs_fingerprint(loaded, samples_file, project / "source") != trusted["inputs_fingerprint"]


@pytest.mark.parametrize("value", ["1", "yes please", "'true'", "null"])
def test_trust_is_true_or_false(project: Path, value: str) -> None:
    assert "model.trust_remote_code" in refused(
        "dequant", project / "recipe.yaml", "--set", f"model.trust_remote_code={value}"
    )
    assert load(project / "recipe.yaml").model.trust_remote_code is False


# Recipes

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
RECIPES = {
    "python tag": ("model: !!python/object/apply:os.system ['exit 1']", "could not determine a constructor"),
    "own tag": ("model: !own {source: x}", "could not determine a constructor"),
    "billion laughs": (LAUGHS, "aliases"),
    "billion merges": (MERGES, "aliases"),
    "endless alias": ("model: &a [*a]", "aliases"),
    "date that is none": ("model: 2024-99-99", "month must be in"),
    "tag on the wrong value": ("model: !!timestamp 5", "not valid YAML"),
    "bool that is none": ("model: !!bool 5", "not valid YAML"),
    "number of 5000 digits": ("model: " + "9" * 5000, "not valid YAML"),
    "hexadecimal of 5000 digits": ("model: {source: 0x" + "f" * 5000 + "}", "a number that is too large"),
    "deep": ("model: " + "[" * 5000, "not valid YAML"),
    "list as a key": ("? [a]\n: b", "is no name"),
    "2,000 keys": ("".join(f"k{number}: 1\n" for number in range(2000)), "and 1983 more"),
    "a megabyte": ("# " + "x" * 2**20, "larger than"),
    "NUL in a path": ('model: {source: "a\\0b"}\nwork_dir: run\nawq: {calibration: {files: [{path: x}]}}',
    "is no path"),
    "nobody's home": ("model: {source: ~nobody-here/x}\nwork_dir: run\nawq: {calibration: {files: [{path: x}]}}",
    "is no path"),
}  # fmt: skip


@pytest.mark.parametrize("fault", RECIPES)
def test_a_hostile_recipe_is_refused(tmp_path: Path, fault: str) -> None:
    text, message = RECIPES[fault]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        found = load(path)
        found.path(found.model.source)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_a_value_in_a_sentence_is_short() -> None:
    assert shown("x") == "'x'"
    assert shown([128, 128]) == "[128, 128]"
    assert len(shown("x" * 10**6)) < 200
    assert len(shown([[["x" * 1000] * 1000] * 1000] * 1000)) < 400
    assert shown(16**5000) == "a number that is too large"


# Chat templates

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
LLAMA = (
    "{{- bos_token }}\n{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}\n"
    "{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n' }}\n"
    "{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}\n"
    "{{- system }}<|eot_id|>\n"
    "{%- for message in messages %}\n{%- if message.tool_calls is defined and message.tool_calls %}"
    "{%- if not message.tool_calls | length == 1 %}{{- raise_exception('one tool call at a time') }}{%- endif %}"
    '{{- \'{"name": "\' + message.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- message.tool_calls[0].function.arguments | tojson }}{{- '}' }}\n"
    "{%- else %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}"
    "{%- endif %}<|eot_id|>{%- endfor %}"
)
MINIMAX = (
    "{%- set ns = namespace(last=-1, names=[]) -%}{%- macro text(content) -%}{%- if content is string -%}{{ content }}"
    "{%- elif content is iterable -%}{%- for part in content -%}{%- if part.type == 'text' -%}"
    "{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "]~!b[]~b]system\n{%- if tools %}# Tools\n<tools>\n{% for tool in tools -%}"
    "<tool>{{ tool.function | tojson }}</tool>\n"
    "{%- endfor %}</tools>{% endif %}[e~[\n"
    "{%- for message in messages if message.role != 'system' -%}{%- if message.role == 'assistant' -%}]~b]ai\n"
    "{%- if '</think>' in text(message.content) and loop.index0 > ns.last -%}<think>"
    "{{ text(message.content).split('</think>')[0].strip('\n').split('<think>')[-1] }}</think>{%- endif -%}"
    "{{ text(message.content).split('</think>')[-1] }}{%- for call in message.tool_calls or [] -%}<invoke name=\""
    '{{ call.function.name }}">{%- for key, value in call.function.arguments.items() -%}<parameter name="{{ key }}">'
    "{{ value if value is string else value | tojson(ensure_ascii=False) }}</parameter>{%- endfor -%}</invoke>"
    "{%- endfor -%}{%- else -%}]~b]{{ message.role }}\n{{ text(message.content) }}{%- endif -%}[e~[\n{%- endfor -%}"
)
TOOL = {"type": "function", "function": {"name": "größe", "description": "<b>&'\"", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "größe", "arguments": {"of": "x < y", "n": [1, 2.5, None, True], "s": "é\u2028"}}}
CHATS: list[tuple[list[dict[str, Any]], list[Any] | None]] = [
    ([{"role": "user", "content": " hello & <b>\n"}, {"role": "assistant", "content": "<think>\nwhy\n</think>量化 🙂"}],
    None),
    ([{"role": "system", "content": "be\u2028brief"}, {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"}], [TOOL]),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL, TOOL]),
]  # fmt: skip


@pytest.mark.parametrize(
    "template", ["synthetic", CHATML, LLAMA, MINIMAX], ids=["synthetic", "chatml", "llama", "minimax"]
)
def test_the_process_renders_what_the_tokenizer_would(pristine: Path, template: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(pristine / "source")
    if template != "synthetic":
        tokenizer.chat_template = template
    chats = [Chat("x", tokenizer.get_chat_template(tools=tools), messages, tools) for messages, tools in CHATS]
    expected = [tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) for messages, tools in CHATS]
    assert render(chats, tokenizer.special_tokens_map) == expected
    assert len(set(expected)) == len(CHATS)


def rendered(*templates: str) -> list[str]:
    """Each template's text for a chat of one message."""
    return render(
        [Chat(f"sample {n}", t, [{"role": "user", "content": "q"}], None) for n, t in enumerate(templates, 1)], {}
    )


def test_no_chats_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert render([], {}) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ raise_exception.__globals__.jinja2.os }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ ''['__class__']['__base__'] }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_reaches_no_objects_of_python(template: str) -> None:
    with pytest.raises(CalibrationError, match="sample 1: the chat template refuses it: "):
        rendered(template)


def test_what_the_sandbox_leaves_undefined_is_nothing() -> None:
    """Unsafe attributes that are printed and not used are undefined, not reached."""
    reaching = ["{{ joiner.__init__ }}", "{{ lipsum.__globals__ }}", "{{ ''|attr('__class__') }}",
    "{{ strftime_now.__globals__ }}",
                "{{ '{0.__class__}'.format('') }}", "{{ self._TemplateReference__context }}"]  # fmt: skip
    assert rendered(*reaching) == [""] * len(reaching)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmq.source.chat_template, "SECONDS", 2)
    with pytest.raises(CalibrationError, match="sample 3: the chat template took more than 2 seconds"):
        rendered("x", "y", LOOP, "z")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**10 }}", "sample 2: the chat template takes more than 1024 MiB of memory"),
        ("{{ '%10000000000d' % 3 }}", "sample 2: the chat template takes more than 1024 MiB of memory"),
        ("{{ 'a' * 5000000 }}", "sample 2: the chat template makes 5,000,000 characters"),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "sample 2: the chat template refuses it: maximum recursion",
        ),
        ("{{ raise_exception('no " + ESCAPE + "') }}", "sample 2: the chat template refuses it: no"),
        ("{% for", "sample 2: the chat template refuses it"),
    ],
)
def test_a_template_that_takes_or_makes_too_much_is_refused(template: str, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        rendered("x", template)
    assert message in str(caught.value)


def is_running(process: str) -> bool:
    """Whether a process is there and more than an entry that nobody has collected yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_takes_the_process_with_it(project: Path, number: int, code: int) -> None:
    (project / "source" / "chat_template.jinja").write_text(LOOP, encoding="utf-8")
    command = [sys.executable, "-m", "mmq", "calibration", str(project / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        give_up = time.monotonic() + 120
        while not (found := children.read_text(encoding="ascii").split()):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    give_up = time.monotonic() + 30
    while is_running(found[0]):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_calibration_and_eval_render_in_that_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template reaches for more memory than a process of mmq would notice."""
    (project / "source" / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}", encoding="utf-8")
    for command in (["calibration"], ["awq", "--set", "awq.source=fp8"]):
        assert "samples.jsonl:2: the chat template takes more than" in refused(
            command[0], project / "recipe.yaml", *command[1:]
        )


def test_half_a_character_in_a_sample_is_refused(project: Path) -> None:
    (project / "samples.jsonl").write_text('{"text": "a \\ud800 b"}\n' * 12, encoding="utf-8")
    assert "samples.jsonl:1 holds half a character" in refused("calibration", project / "recipe.yaml")


def test_the_fuzzer_runs_and_finds_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoint.py"
    command = [sys.executable, str(script), "--inputs", "30", "--seed", "5", "--workers", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["inputs"] == 30
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == 30
    assert len(found["outcomes"]) > 1


def test_a_shard_has_no_longer_name_than_a_file_that_is_being_written(project: Path) -> None:
    """The source's own file has room for it, the outputs' temporary one of its name has not."""
    source = project / "source"
    old, new = min(path.name for path in source.glob("*.safetensors")), "n" * 243 + ".safetensors"
    (source / old).rename(source / new)
    text = (source / INDEX_NAME).read_text(encoding="utf-8")
    (source / INDEX_NAME).write_text(text.replace(old, new), encoding="utf-8")
    message = refused("run", project / "recipe.yaml", "--dry-run")
    assert message.endswith("; no file here has so long a name")
    assert not (project / "run").exists()


def test_a_path_of_two_lines_is_told_in_one(project: Path) -> None:
    message = refused("run", project / "recipe.yaml", "--dry-run", "--set", 'model.source="a\\nb"')
    assert message == f"model.source: there is no folder {project}/a\\nb"
