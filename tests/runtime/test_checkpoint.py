"""Checkpoints: bits survive, any layout loads any other, damage never loads."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.ir.errors import CheckpointError
from shoestring.runtime import checkpoint as module
from shoestring.runtime import tensorfile
from shoestring.runtime.checkpoint import Checkpoint, Shard, load, save

_ODD = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex32,
    torch.complex64,
    torch.complex128,
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaN payloads and negative zeros included."""
    count = dtype.itemsize
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (*shape, count), dtype=torch.uint8)
    if dtype.is_complex:
        half = {4: torch.float16, 8: torch.float32, 16: torch.float64}[count]
        return torch.view_as_complex(raw.view(half))
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensorfile.memory(tensorfile.stored(tensor)))


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    return {
        "parameter/weight": weight,
        "parameter/tied": weight,
        "parameter/transposed": weight.t(),
        "parameter/strided": weight[:, ::2],
        "buffer/scalar": torch.tensor(3.5),
        "buffer/empty": torch.zeros(0, 3),
        "rng/#rng": torch.tensor([1, 2**62], dtype=torch.int64),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", _ODD, ids=str)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": random_bits((3, 5), dtype), "b": random_bits((), dtype)}
    save(tmp_path / "c", tensors, None)
    live = {name: torch.zeros_like(t) for name, t in tensors.items()}
    load(tmp_path / "c", live)
    assert all(bits(live[n]) == bits(t) for n, t in tensors.items())


def test_shapes_views_and_sharing(tmp_path: Path) -> None:
    tensors = state()
    save(tmp_path / "c", tensors, {"step": 3})
    found = Checkpoint.open(tmp_path / "c").read()
    assert list(found) == list(tensors)
    assert all(found[n].equal(t) for n, t in tensors.items())


def test_shared_elements_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    save(tmp_path / "c", {"a": weight, "b": weight}, None)
    record = Checkpoint.open(tmp_path / "c").files["tensors-00000.safetensors"]
    assert record.bytes < 1.5 * weight.nbytes


def test_loading_writes_into_the_live_storage(tmp_path: Path) -> None:
    base = torch.zeros(6, 4)
    live = {"w": base.t()}
    save(tmp_path / "c", {"w": torch.arange(24.0).reshape(4, 6)}, None)
    load(tmp_path / "c", live)
    assert base.t().equal(torch.arange(24.0).reshape(4, 6))


def test_conjugate_views(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j]).conj()
    save(tmp_path / "c", {"z": z}, None)
    assert Checkpoint.open(tmp_path / "c").read()["z"].equal(z.resolve_conj())


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = state()
    save(tmp_path / "c", tensors, None)
    found = load_file(tmp_path / "c" / "tensors-00000.safetensors")
    assert found["parameter/weight"].equal(tensors["parameter/weight"])
    assert found["buffer/scalar"].equal(tensors["buffer/scalar"])


def test_large_states_are_split_into_files(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    save(tmp_path / "c", tensors, None, file_bytes=800)
    found = Checkpoint.open(tmp_path / "c")
    assert len(found.files) == 3
    assert all(found.read()[n].equal(t) for n, t in tensors.items())


# --- layouts ------------------------------------------------------------------------------------


def shards(whole: torch.Tensor, rows: list[int], columns: list[int]) -> list[Shard]:
    """Cuts a matrix at the given rows and columns."""
    r, c = [0, *rows, whole.shape[0]], [0, *columns, whole.shape[1]]
    return [
        Shard(whole[a:b, x:y], (a, x), tuple(whole.shape))
        for a, b in zip(r, r[1:], strict=False)
        for x, y in zip(c, c[1:], strict=False)
    ]


CUTS = [([], []), ([3], []), ([2, 5], [4]), ([], [1, 2, 3]), ([7], [7])]


@pytest.mark.parametrize("saved", CUTS, ids=str)
@pytest.mark.parametrize("wanted", CUTS, ids=str)
def test_any_layout_loads_any_other(tmp_path: Path, saved: Any, wanted: Any) -> None:
    whole = torch.randn(8, 8)
    save(tmp_path / "c", {"w": shards(whole, *saved)}, None, file_bytes=64)
    target = torch.zeros(8, 8)
    for part in shards(target, *wanted):
        load(tmp_path / "c", {"w": part})
    assert target.equal(whole)


def test_shards_must_fill_the_whole_once(tmp_path: Path) -> None:
    whole = torch.zeros(4, 4)
    overlap = [Shard(whole[:3], (0, 0), (4, 4)), Shard(whole[:1], (2, 0), (4, 4))]
    gap = [Shard(whole[:3], (0, 0), (4, 4))]
    for bad in (overlap, gap):
        with pytest.raises(CheckpointError, match="SS6012"):
            save(tmp_path / "c", {"w": bad}, None)
    assert not (tmp_path / "c").exists()


# --- refusals -----------------------------------------------------------------------------------


def refused(folder: Path, live: dict[str, torch.Tensor], code: str) -> str:
    """The error's text; checks that no live element has changed."""
    before = {n: t.clone() for n, t in live.items()}
    with pytest.raises(CheckpointError) as caught:
        load(folder, live)
    assert caught.value.code == code, caught.value
    assert all(live[n].equal(t) for n, t in before.items())
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "c", {"a": torch.ones(2, 3), "b": torch.ones(4)}, {"step": 1})


def live() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def test_other_models_are_refused(saved: Path) -> None:
    text = refused(saved, {"a": torch.zeros(2, 3), "c": torch.zeros(4)}, "SS6007")
    assert text == (
        "[SS6007] loading a checkpoint: it must be of the same model and optimizer; not in the"
        " checkpoint: c; only in the checkpoint: b\n"
        f"  at {saved}\n"
        "  help: build the model and the optimizer as when the checkpoint was saved"
    )


def test_other_shapes_and_types_are_refused(saved: Path) -> None:
    text = refused(saved, {**live(), "a": torch.zeros(3, 2)}, "SS6008")
    assert "loading a: the model needs f32[3,2], the checkpoint has f32[2,3]" in text
    refused(saved, {**live(), "b": torch.zeros(4, dtype=torch.float64)}, "SS6008")


def test_expanded_targets_are_refused(saved: Path) -> None:
    refused(saved, {**live(), "b": torch.zeros(1).expand(4)}, "SS6012")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "no", live(), "SS6001")
    refused(tmp_path, live(), "SS6001")


def test_missing_file(saved: Path) -> None:
    (saved / "tensors-00000.safetensors").unlink()
    refused(saved, live(), "SS6004")


def test_links_are_not_followed(saved: Path) -> None:
    file = saved / "tensors-00000.safetensors"
    shutil.move(file, saved / "elsewhere")
    file.symlink_to(saved / "elsewhere")
    refused(saved, live(), "SS6004")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest as an attacker would: with a digest that fits."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest.pop("digest", None)
    records = {
        n: module.Record(module._DTYPES[t["dtype"]], tuple(t["shape"]), ())
        for n, t in manifest["tensors"].items()
        if t.get("dtype") in module._DTYPES
    }
    manifest["fingerprint"] = module.fingerprint(records)
    path.write_bytes(module._canonical({**manifest, "digest": module._digest(manifest)}))


def piece(manifest: dict[str, Any], name: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = manifest["tensors"][name]["pieces"][0]
    return found


def _escape(manifest: dict[str, Any]) -> None:
    record = manifest["files"].pop("tensors-00000.safetensors")
    manifest["files"]["../secret.safetensors"] = record
    for name in ("a", "b"):
        piece(manifest, name)["file"] = "../secret.safetensors"


CONTRADICTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "path traversal": ("SS6006", _escape),
    "absolute path": ("SS6006", lambda m: m["files"].update({"/etc/x.safetensors": {}})),
    "unlisted file": ("SS6006", lambda m: piece(m).update(file="other.safetensors")),
    "unknown key": ("SS6006", lambda m: piece(m).update(key="zzz")),
    "key of another tensor": ("SS6006", lambda m: piece(m).update(key="b")),
    "outside": ("SS6006", lambda m: piece(m).update(offset=[1, 0])),
    "negative": ("SS6006", lambda m: piece(m).update(offset=[-1, 0])),
    "too small": ("SS6006", lambda m: piece(m).update(shape=[1, 3])),
    "twice": ("SS6006", lambda m: m["tensors"]["a"]["pieces"].append(piece(m))),
    "no pieces": ("SS6006", lambda m: m["tensors"]["a"]["pieces"].clear()),
    "other dtype": ("SS6008", lambda m: m["tensors"]["a"].update(dtype="i32")),
    "unknown dtype": ("SS6006", lambda m: m["tensors"]["a"].update(dtype="f31")),
    "float size": ("SS6006", lambda m: m["tensors"]["a"].update(shape=[2.0, 3])),
    "boolean size": ("SS6006", lambda m: m["tensors"]["a"].update(shape=[True, 6])),
    "huge": ("SS6006", lambda m: m["tensors"]["a"].update(shape=[1 << 62, 1 << 62])),
    "not a table": ("SS6006", lambda m: m.update(files=[1])),
    "no files": ("SS6006", lambda m: m.pop("files")),
    "wrong size": ("SS6004", lambda m: m["files"]["tensors-00000.safetensors"].update(bytes=9)),
    "version": ("SS6003", lambda m: m.update(version=2)),
    "format": ("SS6003", lambda m: m.update(format="other")),
    "fewer tensors": ("SS6007", lambda m: m["tensors"].pop("b")),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tampered_manifests_are_refused(saved: Path, name: str) -> None:
    code, change = CONTRADICTIONS[name]
    rewrite(saved, change)
    refused(saved, live(), code)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 100_000, b"1" * 5000]
)
def test_broken_manifests_are_refused(saved: Path, raw: bytes) -> None:
    (saved / "manifest.json").write_bytes(raw)
    refused(saved, live(), "SS6002")


def test_a_reformatted_manifest_is_refused(saved: Path) -> None:
    path = saved / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    refused(saved, live(), "SS6002")


# --- malformed safetensors files, with hashes that fit -------------------------------------------


def header(table: Any, data: bytes = b"") -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + data


A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}
FILES = {
    "empty": b"",
    "huge header": (1 << 60).to_bytes(8, "little") + b"{}",
    "long header": (100).to_bytes(8, "little") + b"{}",
    "no header": header(b"  "),
    "list": header([]),
    "duplicate": header(b'{"a":{},"a":{}}'),
    "overlap": header({"a": A, "b": {**B, "data_offsets": [16, 32]}}, bytes(32)),
    "gap": header({"a": A, "b": {**B, "data_offsets": [28, 44]}}, bytes(44)),
    "rest": header({"a": A, "b": B}, bytes(48)),
    "short": header({"a": A, "b": B}, bytes(36)),
    "wrong count": header({"a": {**A, "shape": [2, 4]}, "b": B}, bytes(40)),
    "dtype": header({"a": {**A, "dtype": "F33"}, "b": B}, bytes(40)),
    "negative": header({"a": {**A, "shape": [-2, -3]}, "b": B}, bytes(40)),
    "floats": header({"a": {**A, "shape": [2.0, 3.0]}, "b": B}, bytes(40)),
    "entry": header({"a": 7, "b": B}, bytes(40)),
}


@pytest.mark.parametrize("name", FILES)
def test_malformed_files_are_refused(saved: Path, name: str) -> None:
    raw = FILES[name]
    (saved / "tensors-00000.safetensors").write_bytes(raw)
    import hashlib

    record = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite(saved, lambda m: m["files"].update({"tensors-00000.safetensors": record}))
    refused(saved, live(), "SS6005")


def test_every_flip_and_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    """Each byte of each file once flipped, and each file cut at many places."""
    draw = random.Random(0)
    for path in sorted(saved.iterdir()):
        good = path.read_bytes()
        for at in range(len(good)):
            bad = bytearray(good)
            bad[at] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            _refused_somehow(saved)
        for at in sorted({0, len(good) - 1, *(draw.randrange(len(good)) for _ in range(40))}):
            path.write_bytes(good[:at])
            _refused_somehow(saved)
        path.write_bytes(good + b"\0")
        _refused_somehow(saved)
        path.write_bytes(good)
    assert load(saved, live()) == {"step": 1}


def _refused_somehow(folder: Path) -> None:
    target = live()
    with pytest.raises(CheckpointError, match=r"\[SS6\d\d\d\]"):
        load(folder, target)
    assert not any(t.any() for t in target.values())


# --- writing ------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_checkpoint(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="SS6011"):
        save(saved, live(), {"x": object()})
    with pytest.raises(CheckpointError, match="SS6012"):
        save(saved, {"a": torch.zeros(2).to_sparse()}, None)
    assert load(saved, live()) == {"step": 1}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_replacing_a_checkpoint(saved: Path) -> None:
    save(saved, live(), {"step": 2})
    assert Checkpoint.open(saved).extra == {"step": 2}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="SS6009"):
        save(tmp_path / "c", live(), None)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="SS6009"):
        save(tmp_path / "file" / "c", live(), None)
