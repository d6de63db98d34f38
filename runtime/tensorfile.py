"""safetensors files: streamed out with their hash, checked in full before a byte is used.

The layout is that of the safetensors project (8-byte header length, JSON header, data). It is
written and read here rather than through the library so that a file is hashed while it is written,
no second copy of the state is made, and every refusal is ours to word.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from shoestring.ir.errors import CheckpointError

from .plain import is_dict, is_list

MAX_HEADER = 64 << 20
_CHUNK = 4 << 20

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
# The format has no complex numbers of every width: stored as pairs of reals, the last dimension 2.
COMPLEX: dict[torch.dtype, torch.dtype] = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says about a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: element type and shape as stored, first byte within the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is stored: dense, row-major, on the host, complex numbers as pairs."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.contiguous()


def stored_type(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Element type and shape under which a tensor is stored."""
    return (COMPLEX[dtype], (*shape, 2)) if dtype in COMPLEX else (dtype, shape)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, without a copy."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Writes and fsyncs a file; its size and hash."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for block in _blocks(tensors):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _blocks(tensors: Mapping[str, torch.Tensor]) -> Iterable[bytes | memoryview]:
    header = json.dumps(_header(tensors), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # data starts aligned, as the format asks for
    yield struct.pack("<Q", len(header)) + header
    for tensor in tensors.values():
        dense = stored(tensor)
        yield memory(dense)


def _header(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        dtype, shape = stored_type(tensor.dtype, tuple(tensor.shape))
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header


# --- reading ------------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, following no link.

    Raises:
        CheckpointError: SS6004 where there is none.
    """
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise damaged(path, f"a file is required, found none: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise damaged(path, "a regular file is required, found something else")
    return file


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        "SS6004", f"reading a checkpoint: {what}", str(path), "use an earlier checkpoint"
    )


class TensorFile:
    """An open safetensors file whose size, hash and header were checked."""

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path = path
        self._file = open_regular(path)
        try:
            _check_hash(path, self._file, record)
            self._data, self.entries = _read_header(path, self._file, record.bytes)
        except BaseException:
            self._file.close()
            raise

    def read(self, key: str) -> torch.Tensor:
        """A fresh tensor with the stored elements."""
        entry = self.entries[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = memory(tensor)
        self._file.seek(self._data + entry.start)
        at = 0
        while at < len(view):
            count = self._file.readinto(view[at:])  # type: ignore[attr-defined]
            if not count:
                raise damaged(self.path, "the file became shorter while it was read")
            at += cast(int, count)
        return tensor

    def close(self) -> None:
        self._file.close()


def _check_hash(path: Path, file: BinaryIO, record: FileRecord) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != record.bytes:
        raise damaged(path, f"{record.bytes} bytes are required, found {size}")
    digest = hashlib.sha256()
    while block := file.read(_CHUNK):
        digest.update(block)
    if digest.hexdigest() != record.sha256:
        raise damaged(
            path, f"sha256 {record.sha256[:12]}... is required, found {digest.hexdigest()[:12]}..."
        )


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Entry]]:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise malformed(path, f"a header of at most {MAX_HEADER} bytes, found {length}")
    header = parse_json(file.read(length), lambda what: malformed(path, what))
    if not is_dict(header):
        raise malformed(path, "a header that is a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {n: _entry(path, n, item) for n, item in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].nbytes)):
        if entry.start != at:
            raise malformed(path, f"tensors side by side, found a gap or overlap at {name!r}")
        at += entry.nbytes
    if 8 + length + at != size:
        raise malformed(path, f"{at} bytes of data, found {size - 8 - length}")
    return 8 + length, entries


def _entry(path: Path, name: str, item: Any) -> Entry:
    try:
        dtype, shape = DTYPES[item["dtype"]], item["shape"]
        start, end = item["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise malformed(path, f"dtype, shape and data_offsets of {name!r}") from None
    if not is_list(shape) or not all(is_size(d) for d in (*shape, start, end)):
        raise malformed(path, f"whole numbers for the shape and offsets of {name!r}")
    entry = Entry(dtype, tuple(shape), start)
    if entry.nbytes != end - start:
        raise malformed(path, f"{entry.nbytes} bytes for {name!r}, found {end - start}")
    return entry


def malformed(path: Path, wanted: str) -> CheckpointError:
    return CheckpointError("SS6005", f"reading a tensor file: required: {wanted}", str(path))


def is_size(value: Any) -> bool:
    """Whether a JSON value is a whole number that can be a size."""
    return type(value) is int and 0 <= value < 1 << 62


def parse_json(raw: bytes, fail: Callable[[str], CheckpointError]) -> Any:
    """The JSON value in `raw`; `fail(wanted)` is raised for broken JSON and for duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("each key once")
        return table

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise fail(f"JSON text: {error}") from None
