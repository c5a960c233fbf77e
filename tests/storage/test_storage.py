"""Shards, atomic files and checkpoint folders, against the safetensors library and the file system."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from safetensors import safe_open

from conftest import digests, edit_json
from mmq.errors import CheckpointError, DiskSpaceError
from mmq.storage.atomic import atomic_file, remove_temporaries, write_bytes, write_json
from mmq.storage.checkpoint import Checkpoint
from mmq.storage.shards import DTYPES, TensorSpec, save_tensors, shard_size, write_shard

INDEX = "model.safetensors.index.json"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a sharded checkpoint with the safetensors library; `change` replaces, adds or removes tensors by name."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    weight_map: dict[str, str] = index["weight_map"]
    shards = sorted(set(weight_map.values()))
    tensors = {n: t for shard in shards for n, t in safetensors.torch.load((folder / shard).read_bytes()).items()}
    change(tensors)
    index["weight_map"] = {name: weight_map.get(name, shards[0]) for name in tensors}
    for shard in shards:
        held = {name: tensor.contiguous() for name, tensor in tensors.items() if index["weight_map"][name] == shard}
        safetensors.torch.save_file(held, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def bits(tensor: torch.Tensor) -> list[int]:
    """A tensor's bytes, NaN or not."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def samples_of_all_dtypes() -> dict[str, torch.Tensor]:
    """Random bits in every dtype, odd lengths, an empty tensor and a scalar of each."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        count = 3 * (number + 1)
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), generator=generator)
        tensors[f"{number}.{name}"] = raw.to(torch.uint8).view(dtype).view(3, -1)
        tensors[f"empty.{name}"] = torch.empty(0, 5, dtype=dtype)
        tensors[f"scalar.{name}"] = torch.ones((), dtype=dtype)
    return tensors


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the JSON header, from the format's definition."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length, json.loads(content[8 : 8 + length])


def test_safetensors_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    tensors = samples_of_all_dtypes()
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_the_writer_makes_the_same_data_as_the_library(tmp_path: Path) -> None:
    tensors = samples_of_all_dtypes()
    save_tensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (safetensors.torch.load((tmp_path / name).read_bytes()) for name in ("ours", "theirs"))
    assert {n: bits(t) for n, t in ours.items()} == {n: bits(t) for n, t in theirs.items()}


def test_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    tensors = samples_of_all_dtypes()
    save_tensors(tmp_path / "x.safetensors", tensors)
    begin, header = header_of(tmp_path / "x.safetensors")
    assert begin % 8 == 0
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        assert first == end, f"a gap before {name}"
        assert (begin + first) % tensors[name].dtype.itemsize == 0, f"{name} is not aligned"
        end = last
    assert begin + end == (tmp_path / "x.safetensors").stat().st_size


def test_the_planned_size_is_the_files_size(tmp_path: Path) -> None:
    for count, name in enumerate(("a", "ein ünïcode 名", "b" * 300), start=1):
        specs = [TensorSpec(f"{name}.{i}", "BF16", (i, 3)) for i in range(count)]
        path = tmp_path / f"{count}.safetensors"
        with write_shard(path, specs) as shard:
            for spec in shard.specs:
                shard.add(spec.name, torch.zeros(spec.shape, dtype=torch.bfloat16))
        assert shard_size(specs) == path.stat().st_size == shard.record.size
        assert set(safetensors.torch.load(path.read_bytes())) == {spec.name for spec in specs}


def test_the_record_is_the_files_digest_and_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    record = save_tensors(path, samples_of_all_dtypes())
    assert record.name == "x.safetensors"
    assert record.size == path.stat().st_size
    assert record.digest == xxhash.xxh3_128(path.read_bytes()).hexdigest()


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    save_tensors(tmp_path / "x.safetensors", {"turned": base.T, "part": base[1:3, ::2]})
    read = safetensors.torch.load((tmp_path / "x.safetensors").read_bytes())
    assert torch.equal(read["turned"], base.T)
    assert torch.equal(read["part"], base[1:3, ::2])


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(6)],
    ids=["shape", "dtype", "dimensions"],
)
def test_a_tensor_that_differs_from_its_header_leaves_no_file(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"weight"), write_shard(path, [TensorSpec("weight", "F32", (2, 3))]) as shard:
        shard.add("weight", tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_tensor_leaves_no_file(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (1,)), TensorSpec("b", "F32", (1,))]
    with pytest.raises(ValueError, match=r"lacks b"), write_shard(tmp_path / "x.safetensors", specs) as shard:
        shard.add("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half of the new")
        raise error
    assert digests(tmp_path).keys() == {"file"}
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "journal.json"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskSpaceError, match=r"journal\.json"):
            write_json(path, {"new": 1})
    assert digests(tmp_path).keys() == {"journal.json"}
    assert path.read_bytes() == b"old"
    write_json(path, {"new": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"new": 1}


def test_a_device_that_takes_no_bytes_is_a_full_disk(tmp_path: Path) -> None:
    """/dev/full behind the temporary's name: the kernel itself says ENOSPC."""
    (tmp_path / "x.mmq-tmp").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError):
        write_bytes(tmp_path / "x", b"content")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_keep_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        write_bytes(tmp_path / "x", b"content")
    assert list(tmp_path.iterdir()) == []


def test_only_temporaries_are_removed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.safetensors.mmq-tmp", "b.mmq-tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_temporaries(tmp_path)
    assert digests(tmp_path).keys() == {"a.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards that the safetensors library wrote."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)},
        "model-00002-of-00002.safetensors": {"c": torch.arange(5)},
    }
    for shard, tensors in parts.items():
        safetensors.torch.save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in parts.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "x"}', encoding="utf-8")
    return folder


def test_open_reads_headers_and_hands_out_tensors(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.specs == {
        "a": TensorSpec("a", "F32", (2, 3)),
        "b": TensorSpec("b", "BF16", (4,)),
        "c": TensorSpec("c", "I64", (5,)),
    }
    assert checkpoint.nbytes == 24 + 8 + 40
    assert checkpoint.shard_of("c") == "model-00002-of-00002.safetensors"
    with checkpoint.reader() as reader:
        assert torch.equal(reader["c"], torch.arange(5))
        assert torch.equal(reader["a"], torch.ones(2, 3))
        with pytest.raises(CheckpointError, match="no tensor nothing"):
            reader["nothing"]


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shards.keys() == {"model.safetensors"}
    with checkpoint.reader() as reader:
        assert torch.equal(reader["a"], torch.ones(2))


def put(tensor: str, shard: Any) -> Callable[[Path], None]:
    """A change of the index."""
    return lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({tensor: shard}))


def truncate(path: Path, by: int = 1) -> None:
    """Cut bytes off a file's end."""
    os.truncate(path, path.stat().st_size - by)


def link_out(folder: Path) -> None:
    """Make the second shard a link to the same bytes outside."""
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder.parent / "outside.safetensors")
    shard.symlink_to(folder.parent / "outside.safetensors")


def absolute(folder: Path) -> None:
    """Let the index name a whole shard elsewhere by its absolute path."""
    link_out(folder)
    put("c", str(folder.parent / "outside.safetensors"))(folder)


def parent(folder: Path) -> None:
    """Let the index name a whole shard in the folder above."""
    link_out(folder)
    put("c", "../outside.safetensors")(folder)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "there is no checkpoint folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json can't be read"),
    "no index": (lambda f: (f / INDEX).unlink(), "holds neither"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), r"index\.json has no weight_map"),
    "index is torn": (lambda f: truncate(f / INDEX, 5), r"index\.json can't be read"),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002.* is missing"),
    "truncated shard": (lambda f: truncate(f / "model-00002-of-00002.safetensors"), "model-00002.* truncated"),
    "header cut": (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 20), "model-00001.* truncated"),
    "empty shard": (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 0), "model-00001.* truncated"),
    "longer shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").open("ab").write(b"x"),
        "model-00002.* truncated",
    ),
    "parent folder": (parent, r"puts c in '\.\./outside\.safetensors'"),
    "absolute path": (absolute, r"puts c in '/.*outside\.safetensors'"),
    "link out of the folder": (link_out, "model-00002.* leads out of its folder"),
    "pickled weights": (put("c", "pytorch_model.bin"), r"puts c in 'pytorch_model\.bin'"),
    "shard is a number": (put("c", 2), "puts c in 2"),
    "index names more": (put("d", "model-00001-of-00002.safetensors"), "puts d in model-00001.*does not hold it"),
    "index names the wrong shard": (put("c", "model-00001-of-00002.safetensors"), "puts c in model-00001"),
    "shard holds more": (
        lambda f: edit_json(f / INDEX, lambda index: index["weight_map"].pop("b")),
        "model-00001.* holds b, which the index does not name",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_by_name(folder: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def hub_cache(folder: Path, root: Path) -> Path:
    """The hub cache's layout of a checkpoint: links from a snapshot to blobs."""
    repo = root / "models--owner--name"
    snapshot = repo / "snapshots" / "0123abc"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_the_hub_caches_links_are_followed(folder: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(folder).specs
    snapshot = hub_cache(folder, tmp_path / "hub")
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.specs == before
    with checkpoint.reader() as reader:
        assert torch.equal(reader["c"], torch.arange(5))


def test_the_hub_caches_links_must_stay_in_their_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path / "hub")
    shard = snapshot / "model-00002-of-00002.safetensors"
    shard.resolve().rename(tmp_path / "outside.safetensors")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        Checkpoint.open(snapshot)


def test_read_ahead_takes_any_tensors(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.read_ahead(["a", "b", "c"])
    with pytest.raises(CheckpointError, match="no tensor d"):
        checkpoint.read_ahead(["d"])


def test_the_fingerprint_tells_dtypes_shapes_names_and_config_apart(folder: Path) -> None:
    seen = {Checkpoint.open(folder).fingerprint()}
    assert Checkpoint.open(folder).fingerprint() in seen
    changes: list[Callable[[dict[str, torch.Tensor]], Any]] = [
        lambda tensors: tensors.update(a=torch.ones(3, 2)),
        lambda tensors: tensors.update(a=torch.ones(3, 2, dtype=torch.int32)),
        lambda tensors: tensors.update(z=tensors.pop("c")),
    ]
    for number, change in enumerate(changes, start=2):
        edit_tensors(folder, change)
        seen.add(Checkpoint.open(folder).fingerprint())
        assert len(seen) == number
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=1))
    assert Checkpoint.open(folder).fingerprint() not in seen


def test_only_small_plain_files_are_carried(folder: Path) -> None:
    carried = ["LICENSE", "chat_template.jinja", "merges.txt", "modeling_x.py", "tokenizer.json"]
    others = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "optimizer.pt",
        "x.onnx",
        "extra.safetensors",
        ".gitattributes",
        "tokenizer.json.lock",
        "blob.incomplete",
        "README.md",
    ]
    for name in carried + others:
        (folder / name).write_text(name)
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.txt").write_text("x")
    assert [path.name for path in Checkpoint.open(folder).carried_files()] == carried


def test_a_carried_file_must_not_come_from_outside_the_folder(folder: Path, tmp_path: Path) -> None:
    """As for shards: a link could pull any file of the machine into a folder that is meant to be published."""
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    checkpoint = Checkpoint.open(folder)
    try:
        carried = [path.name for path in checkpoint.carried_files()]
    except CheckpointError:
        return
    assert carried == []
