"""One checkpoint: a folder of safetensors files and a manifest.

    step-0000000100/
        manifest.json
        tensors-00000.safetensors

The manifest names each tensor globally (`parameter/transformer.wte.weight`) and lists the pieces
that it is stored as, each with its offset in the whole, so that any layout can load any other. It
carries the size and hash of every file, and its own digest; its bytes must be exactly the canonical
form, so that no bit of a checkpoint can change unnoticed.

Invariants:
    1. A folder of the final name is complete: it was written under another name, fsynced, renamed.
    2. `Checkpoint.open` checks everything that can be checked without a model; `load_into` checks
       everything against the live tensors before the first element is written.
    3. Nothing in a checkpoint is executed, and no path in it leaves its folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from shoestring.ir import DTYPE_NAMES
from shoestring.ir.errors import CheckpointError

from . import plain, tensorfile
from .tensorfile import FileRecord, TensorFile, is_size, stored_type

FORMAT = "shoestring-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 256 << 20
FILE_BYTES = 4 << 30

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{64}")
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """A part of a tensor: its elements, where they start in the whole, and the whole's shape."""

    tensor: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a part of a tensor is stored."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What a manifest says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"


Savable = torch.Tensor | Sequence[Shard]
Loadable = torch.Tensor | Shard


# --- writing ------------------------------------------------------------------------------------


def save(
    folder: Path, tensors: Mapping[str, Savable], extra: Any, *, file_bytes: int = FILE_BYTES
) -> Path:
    """Writes a checkpoint; after a crash at any instant `folder` is absent, old or complete.

    Args:
        folder: the checkpoint's folder; an existing one is replaced.
        tensors: by global name; a tensor, or all its shards.
        extra: plain values (see `plain`).
        file_bytes: a new file is started beyond this size.

    Returns:
        The folder.

    Raises:
        CheckpointError: SS6009 where the disk refuses, SS6011 for a value that is not plain, SS6012
            for a tensor that cannot be stored.
    """
    folder = Path(folder)
    encoded = plain.encode(extra, "extra")
    shards = {name: _shards(name, t) for name, t in tensors.items()}
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_manifest(temporary, _write_tensors(temporary, shards, file_bytes), encoded)
        _sync_folder(temporary)
        _publish(temporary, folder)
    except OSError as error:
        raise CheckpointError(
            "SS6009",
            f"saving a checkpoint: {error.strerror or error}",
            str(folder),
            "free space or choose another folder; earlier checkpoints are untouched",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _publish(temporary: Path, folder: Path) -> None:
    """Renames into place. A replaced checkpoint stays beside until the new one is durable."""
    aside = folder.parent / f".old-{folder.name}"
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(temporary, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shards(name: str, tensor: Savable) -> list[Shard]:
    if isinstance(tensor, torch.Tensor):
        tensor = [Shard(tensor, (0,) * tensor.ndim, tuple(tensor.shape))]
    for shard in tensor:
        t = shard.tensor
        if (
            t.layout is not torch.strided
            or t.is_meta
            or stored_type(t.dtype, ())[0] not in (tensorfile.NAMES)
        ):
            raise CheckpointError(
                "SS6012", f"saving {name}: a dense tensor is required, found {t.dtype} {t.layout}"
            )
    whole = tensor[0].shape
    problem = _coverage([(s.offset, tuple(s.tensor.shape)) for s in tensor], whole)
    if problem or any(s.shape != whole or s.tensor.dtype != tensor[0].tensor.dtype for s in tensor):
        raise CheckpointError(
            "SS6012", f"saving {name}: shards of one tensor must fill it once{problem}"
        )
    return list(tensor)


@dataclass(frozen=True)
class _Body:
    """The part of a manifest that describes files and tensors."""

    files: dict[str, FileRecord]
    tensors: dict[str, Record]


def _write_tensors(folder: Path, shards: Mapping[str, list[Shard]], file_bytes: int) -> _Body:
    """Writes each distinct tensor once; names that share all their elements share a piece."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    homes: dict[Any, tuple[str, str]] = {}
    records: dict[str, Record] = {}
    for name, parts in shards.items():
        pieces: list[Piece] = []
        for index, shard in enumerate(parts):
            t = shard.tensor
            identity = (t.data_ptr(), t.dtype, t.device, tuple(t.shape), t.stride(), t.is_conj())
            if identity not in homes or t.numel() == 0:
                if size and size + t.nbytes > file_bytes:
                    groups.append({})
                    size = 0
                key = name if len(parts) == 1 else f"{name}@{index}"
                groups[-1][key] = t
                size += t.nbytes
                homes[identity] = (f"tensors-{len(groups) - 1:05d}.safetensors", key)
            pieces.append(Piece(*homes[identity], shard.offset, tuple(t.shape)))
        records[name] = Record(parts[0].tensor.dtype, parts[0].shape, tuple(pieces))
    files = {f"tensors-{i:05d}.safetensors": group for i, group in enumerate(groups)}
    return _Body({f: tensorfile.write(folder / f, g) for f, g in files.items()}, records)


def _write_manifest(folder: Path, body: _Body, extra: Any) -> None:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(body.tensors),
        "versions": _versions(),
        "files": {name: asdict(record) for name, record in body.files.items()},
        "tensors": {name: _record_json(record) for name, record in body.tensors.items()},
        "extra": extra,
    }
    with open(folder / MANIFEST, "xb") as file:
        file.write(_canonical({**manifest, "digest": _digest(manifest)}))
        file.flush()
        os.fsync(file.fileno())


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[record.dtype],
        "shape": list(record.shape),
        "pieces": [
            {"file": p.file, "key": p.key, "offset": list(p.offset), "shape": list(p.shape)}
            for p in record.pieces
        ],
    }


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, allow_nan=False).encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(manifest)).hexdigest()


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("shoestring")
    except metadata.PackageNotFoundError:  # run from a source tree without installation
        own = "unknown"
    return {"shoestring": own, "torch": str(torch.__version__), "python": platform.python_version()}


def fingerprint(records: Mapping[str, Record]) -> str:
    """A hash of names, element types and shapes: equal for two states that fit each other."""
    lines = sorted(f"{name} {record}" for name, record in records.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was read and checked."""

    folder: Path
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Record]
    versions: Mapping[str, str]
    extra: Any

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Reads and checks the manifest.

        Raises:
            CheckpointError: SS6001 nothing there, SS6002 damaged manifest, SS6003 another format,
                SS6006 a manifest that contradicts itself.
        """
        return _open(Path(folder))

    def check(self, into: Mapping[str, Loadable]) -> None:
        """Checks that the live tensors are those of the checkpoint.

        Raises:
            CheckpointError: SS6007 other names, SS6008 other shapes or element types.
        """
        _check_names(self, into)
        for name, target in into.items():
            _check_type(self, name, target)

    def load_into(self, into: Mapping[str, Loadable]) -> None:
        """Copies the state into live tensors; raises before the first write or not at all.

        Raises:
            CheckpointError: SS6004 or SS6005 a damaged file, SS6007, SS6008 another model.
        """
        self.check(into)
        with self._opened() as files, torch.no_grad():
            for name, target in into.items():
                _copy(self.tensors[name], files, target)

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors, freshly allocated.

        Raises:
            CheckpointError: SS6004, SS6005 where a file is damaged.
        """
        with self._opened() as files:
            fresh = {n: torch.empty(r.shape, dtype=r.dtype) for n, r in self.tensors.items()}
            for name, tensor in fresh.items():
                _copy(self.tensors[name], files, tensor)
            return fresh

    def validate(self) -> None:
        """Checks every file in full.

        Raises:
            CheckpointError: SS6004, SS6005 where a file is damaged.
        """
        with self._opened():
            pass

    @contextmanager
    def _opened(self) -> Generator[dict[str, TensorFile]]:
        """The files, hashed, and every piece found in them with its type."""
        files: dict[str, TensorFile] = {}
        try:
            for name, record in self.files.items():
                files[name] = TensorFile(self.folder / name, record)
            for name, tensor in self.tensors.items():
                for piece in tensor.pieces:
                    _check_piece(self, name, piece, files[piece.file])
            yield files
        finally:
            for file in files.values():
                with closing(file):
                    pass


def load(folder: Path, into: Mapping[str, Loadable]) -> Any:
    """Copies a checkpoint into live tensors and returns its plain values.

    Raises:
        CheckpointError: see `Checkpoint`; the live tensors are then untouched.
    """
    checkpoint = Checkpoint.open(folder)
    checkpoint.load_into(into)
    return checkpoint.extra


def _open(folder: Path) -> Checkpoint:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError("SS6001", "a checkpoint folder is required, found none", str(folder))
    if not path.exists():
        raise CheckpointError("SS6001", f"a checkpoint needs a {MANIFEST}, found none", str(folder))
    with tensorfile.open_regular(path) as file:
        raw = file.read(MAX_MANIFEST + 1)
    manifest = _parse_manifest(path, raw)
    try:
        files, tensors = _files(manifest["files"]), _tensors(manifest["tensors"])
        versions, extra = cast(dict[str, str], manifest["versions"]), manifest["extra"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _inconsistent(f"{type(error).__name__}: {error}", path) from None
    for name, record in tensors.items():
        for piece in record.pieces:
            if piece.file not in files:
                raise _inconsistent(f"{name} lies in {piece.file!r}, which is not listed", path)
    if manifest.get("fingerprint") != fingerprint(tensors):
        raise _inconsistent("the fingerprint is that of other tensors", path)
    return Checkpoint(folder, files, tensors, versions, plain.decode(extra))


def _parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(
            "SS6002",
            f"reading a manifest: required: {what}",
            str(path),
            "use an earlier checkpoint",
        )

    if len(raw) > MAX_MANIFEST:
        raise broken(f"at most {MAX_MANIFEST} bytes")
    parsed = tensorfile.parse_json(raw, broken)
    if not plain.is_dict(parsed):
        raise broken("a JSON object")
    manifest: dict[str, Any] = parsed
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise CheckpointError(
            "SS6003",
            f"reading a manifest: {FORMAT!r} version {VERSION} is required, found {found[:100]}",
            str(path),
            "load it with the release that wrote it",
        )
    digest = manifest.pop("digest", None)
    try:
        exact = _canonical({**manifest, "digest": digest}) == raw
    except ValueError:
        exact = False
    if not exact or digest != _digest(manifest):
        raise broken("the digest that was written with it (it was changed or damaged)")
    return manifest


def _files(table: dict[str, Any]) -> dict[str, FileRecord]:
    for name, item in table.items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"a plain file name is required, found {name[:100]!r}")
        if not is_size(item["bytes"]) or not _HASH.fullmatch(item["sha256"]):
            raise ValueError(f"size and sha256 of {name} are required")
    return {name: FileRecord(item["bytes"], item["sha256"]) for name, item in table.items()}


def _tensors(table: dict[str, Any]) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for name, item in table.items():
        pieces = tuple(
            Piece(str(p["file"]), str(p["key"]), _sizes(p["offset"]), _sizes(p["shape"]))
            for p in item["pieces"]
        )
        record = Record(_DTYPES[item["dtype"]], _sizes(item["shape"]), pieces)
        problem = _coverage([(p.offset, p.shape) for p in pieces], record.shape)
        if problem:
            raise ValueError(f"the pieces of {name} must fill it once{problem}")
        records[name] = record
    return records


def _sizes(value: Any) -> tuple[int, ...]:
    if not plain.is_list(value) or not all(map(is_size, value)):
        raise ValueError(f"a list of sizes is required, found {str(value)[:100]}")
    return tuple(value)


def _coverage(
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], whole: tuple[int, ...]
) -> str:
    """What is wrong with boxes (offset, shape) that should tile `whole`; nothing where they do."""
    volume = 0
    for offset, shape in boxes:
        if not len(offset) == len(shape) == len(whole):
            return f": {shape} has another rank than {whole}"
        if any(o + s > w for o, s, w in zip(offset, shape, whole, strict=True)):
            return f": {shape} at {offset} lies outside of {whole}"
        volume += math.prod(shape)
    if not boxes or volume != math.prod(whole):
        return f": {volume} of {math.prod(whole)} elements are there"
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            if _overlap(*a, *b) is not None:
                return f": {a[1]} at {a[0]} overlaps {b[1]} at {b[0]}"
    return ""


def _overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], other: tuple[int, ...], size: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """The common (start, end) per dimension of two boxes, or None."""
    ranges = [
        (max(a, b), min(a + m, b + n))
        for a, m, b, n in zip(offset, shape, other, size, strict=True)
    ]
    return ranges if all(start < end for start, end in ranges) else None


def _inconsistent(what: str, path: Path) -> CheckpointError:
    return CheckpointError("SS6006", f"reading a manifest: {what}", str(path))


# --- fitting a checkpoint to live tensors -------------------------------------------------------


def _check_names(checkpoint: Checkpoint, into: Mapping[str, Loadable]) -> None:
    missing = [n for n in into if n not in checkpoint.tensors]
    unexpected = [n for n in checkpoint.tensors if n not in into]
    if missing or unexpected:
        parts = [f"not in the checkpoint: {_some(missing)}"] if missing else []
        parts += [f"only in the checkpoint: {_some(unexpected)}"] if unexpected else []
        raise CheckpointError(
            "SS6007",
            "loading a checkpoint: it must be of the same model and optimizer; " + "; ".join(parts),
            str(checkpoint.folder),
            "build the model and the optimizer as when the checkpoint was saved",
        )


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _check_type(checkpoint: Checkpoint, name: str, target: Loadable) -> None:
    record = checkpoint.tensors[name]
    shard = target if isinstance(target, Shard) else None
    live = target.tensor if isinstance(target, Shard) else target
    shape = shard.shape if shard else tuple(live.shape)
    if shape != record.shape or live.dtype != record.dtype:
        found = Record(live.dtype, shape, ())
        raise CheckpointError(
            "SS6008",
            f"loading {name}: the model needs {found}, the checkpoint has {record}",
            str(checkpoint.folder),
            "build the model as when the checkpoint was saved",
        )
    if shard and any(o + s > w for o, s, w in zip(shard.offset, live.shape, shape, strict=True)):
        raise CheckpointError("SS6008", f"loading {name}: the shard lies outside of {record}")
    if any(stride == 0 < size - 1 for stride, size in zip(live.stride(), live.shape, strict=True)):
        raise CheckpointError(
            "SS6012", f"loading {name}: elements of their own are required, found an expanded view"
        )


def _check_piece(checkpoint: Checkpoint, name: str, piece: Piece, file: TensorFile) -> None:
    entry = file.entries.get(piece.key)
    wanted = stored_type(checkpoint.tensors[name].dtype, piece.shape)
    if entry is None or (entry.dtype, entry.shape) != wanted:
        found = "none" if entry is None else f"{entry.dtype} {entry.shape}"
        raise _inconsistent(
            f"{name} needs {wanted[0]} {wanted[1]} in {piece.file}, found {found}",
            checkpoint.folder,
        )


def _copy(record: Record, files: Mapping[str, TensorFile], target: Loadable) -> None:
    """Copies the pieces, as far as they overlap the target, into it."""
    live = target.tensor if isinstance(target, Shard) else target
    offset = target.offset if isinstance(target, Shard) else (0,) * live.ndim
    for piece in record.pieces:
        common = _overlap(offset, tuple(live.shape), piece.offset, piece.shape)
        if common is None:
            continue
        elements = files[piece.file].read(piece.key)
        if record.dtype in tensorfile.COMPLEX:
            elements = torch.view_as_complex(elements)
        source = tuple(slice(s - o, e - o) for (s, e), o in zip(common, piece.offset, strict=True))
        place = tuple(slice(s - o, e - o) for (s, e), o in zip(common, offset, strict=True))
        live[place].copy_(elements[source])
