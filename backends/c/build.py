"""Building generated C: cached by content, written atomically, safe for concurrent processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from shoestring.ir.errors import BackendError

from ..cache import cache_folder, mark_used, trim_meanwhile

FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fwrapv",
    "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
# No copies of functions for constant arguments, and none of loops for conditions and strides: what
# is compiled for each case says so. They double the compile time of gemm.c for nothing.
GCC_FLAGS = (
    "-fno-ipa-cp", "-fno-unswitch-loops", "-fno-split-loops", "-fno-version-loops-for-strides",
)  # fmt: skip
_AVX2 = "-march=x86-64-v3"
_EMULATED = (_AVX2, "-DSS_EMULATE_AVX512", "-O1", "-Wno-psabi")  # -O3 takes GCC 13 s for gemm.c
# What `$SHOESTRING_ISA` may name: levels that every compiler knows, the machine's own, and what
# tests emulate where AVX2 is all there is.
ISAS = {
    "native": ("-march=native",), "avx512": ("-march=x86-64-v4",), "avx2": (_AVX2,), "generic": (),
    "emulated-avx512": _EMULATED, "emulated-amx": (*_EMULATED, "-DSS_EMULATE_AMX"),
}  # fmt: skip
HERE = Path(__file__).parent
# What other files include: headers, and what small.c consists of.
INCLUDED = (
    "prelude.h", "vector.h", "wide.h", "gemm.h", "digits.h", "turn.h", "pack.h", "amx.h", "pool.h",
    "attention.h", "attention_f64.h", "attention_call.h", "attention_kernel.h", "trial.h", "run.h",
    "far.h", "draws.h", "draws.c", "far.c", "frame.c", "trial.c",
)  # fmt: skip
# Written by hand, compiled once for a machine: what every library is linked with, and what those
# are whose sources include a header.
RUNTIME = ("gemm.c", "small.c", "pool.c", "run.c")
RUNTIME_OF = {"attention.h": ("attention.c",), "attention_f64.h": ("attention_f64.c",)}
JOBS = max(2, os.cpu_count() or 1)
_COMMENT = re.compile(r"^[ \t]*//.*\n", re.MULTILINE)
_PARTS = (RUNTIME, *RUNTIME_OF.values())
_LOCKS = {files: threading.Lock() for files in _PARTS}


@dataclass(frozen=True)
class Build:
    """A built library.

    Attributes:
        path: the shared object.
        source: the folder with its C files.
        cache_hit: whether it was there already.
    """

    path: Path
    source: Path
    cache_hit: bool


def find_compiler() -> str:
    """The C compiler: `$CC`, else `cc`, `gcc` or `clang`.

    Raises:
        BackendError: SS4201 where there is none.
    """
    given = os.environ.get("CC")
    for name in [given] if given else ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    what = f"a C compiler is required to build kernels, found none ({given or 'cc, gcc, clang'})"
    hint = "install gcc or clang, point CC at one, or use the backend 'reference'"
    raise BackendError("SS4201", what, "", hint)


@cache
def compiler_version(compiler: str) -> str:
    """The first line of `cc --version`.

    Raises:
        BackendError: SS4201 where the compiler does not start.
    """
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        hint = "check CC"
        raise BackendError(
            "SS4201", f"the C compiler {compiler} does not run", str(error), hint
        ) from error
    return done.stdout.splitlines()[0] if done.stdout else ""


@cache
def cpu_identity() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features")
    picked = dict(line.split(":", 1) for line in lines if line.startswith(wanted) and ":" in line)
    return "\n".join(picked.values())


def flags() -> tuple[str, ...]:
    """The compiler's flags here. GCC holds back from 512-bit vectors; math-heavy kernels gain.

    Raises:
        BackendError: SS4201 without a compiler, SS4204 where `$SHOESTRING_ISA` names no instruction
            set.
    """
    isa = os.environ.get("SHOESTRING_ISA", "native")
    if isa not in ISAS:
        what = f"SHOESTRING_ISA is one of {', '.join(ISAS)}; found {isa!r}"
        raise BackendError("SS4204", what, "", "unset it to use what this machine has")
    has_wide = isa in ("native", "avx512") and "avx512f" in cpu_identity()
    wide = ("-mprefer-vector-width=512",) if has_wide else ()
    # Without it GCC 12 leaves arrays of functions that call nothing unaligned (GCC bug 109780).
    own = ("-mno-red-zone",) if platform.machine() in ("x86_64", "AMD64") else ()
    gcc = () if "clang" in compiler_version(find_compiler()) else GCC_FLAGS
    return (*FLAGS, *gcc, *ISAS[isa], *wide, *own)


def build(sources: Sequence[str]) -> Build:
    """The sources as one shared library, built unless the cache has it or one of equal code: lines
    of comments, which name the user's lines, are not part of its key.

    Raises:
        BackendError: SS4201 without a compiler, SS4202 where the C does not compile, SS4203 where
            the cache cannot be written.
    """
    compiler = find_compiler()
    texts = {f"kernels{i}.c": source for i, source in enumerate(sources)}

    def make(work: Path) -> None:
        with ThreadPoolExecutor(JOBS) as pool:
            parts = [pool.submit(_objects, compiler, files) for files in runtime_of(sources)]
            _compile(compiler, texts, work)
        objects = [path for part in parts for path in part.result()]
        _link(compiler, [*(f"{Path(name).stem}.o" for name in texts), *objects], work)

    code = {name: _COMMENT.sub("", text) for name, text in texts.items()}
    return _cached(_key(compiler, code), "kernels.so", make)


def build_runtime_ahead() -> threading.Thread:
    """Begins to build what every library is linked with; a `build` meanwhile waits for it.

    What fails here fails again in `build`, which reports it.
    """

    def work() -> None:
        with contextlib.suppress(Exception):
            _objects(find_compiler(), RUNTIME)

    thread = threading.Thread(target=work, name="shoestring-runtime")
    thread.start()
    return thread


def runtime_of(sources: Iterable[str]) -> list[tuple[str, ...]]:
    """The hand-written files that the sources are linked with, in parts that are built together."""
    texts = list(sources)
    used = [f for header, f in RUNTIME_OF.items() if any(f'"{header}"' in t for t in texts)]
    return [RUNTIME, *used]


def _objects(compiler: str, files: tuple[str, ...]) -> list[str]:
    """Paths of the objects of one part of what is written by hand."""
    texts = {name: (HERE / name).read_text() for name in files}
    last = f"{Path(files[-1]).stem}.o"
    with _LOCKS[files]:
        built = _cached(_key(compiler, texts), last, lambda work: _compile(compiler, texts, work))
    return [str(built.source / f"{Path(name).stem}.o") for name in files]


def _cached(key: str, product: str, make: Callable[[Path], None]) -> Build:
    """The folder of the cache for `key`, filled by `make` unless its product is there and whole."""
    folder = cache_folder() / key[:2] / key
    if _intact(folder / product):
        mark_used(folder / product)
        return Build(folder / product, folder, True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{key[:8]}.", dir=folder.parent))
    except OSError as error:
        hint = "set SHOESTRING_CACHE to a folder that can be written"
        raise BackendError(
            "SS4203", f"the kernel cache {folder} cannot be written", str(error), hint
        ) from error
    try:
        make(work)
        made = work / product
        made.with_suffix(".sha256").write_text(_digest(made))
        _publish(work, folder, product)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    trim_meanwhile()
    return Build(folder / product, folder, False)


def machine_key() -> str:
    """What the speed and the code of hand-written kernels depend on.

    Raises:
        BackendError: SS4201 without a compiler.
    """
    return _key(find_compiler(), {})


def cached_text(name: str, make: Callable[[], str]) -> str:
    """What is known of this machine and its compiler, by name: made once, kept in the cache.

    Raises:
        BackendError: SS4201 without a compiler, SS4203 where the cache cannot be written.
    """

    def write(work: Path) -> None:
        (work / name).write_text(make())

    return _cached(_key(find_compiler(), {name: name}), name, write).path.read_text()


def defined_names(*more: str) -> dict[str, str]:
    """What the compiler defines with the flags of `flags` and `more`, by name.

    Raises:
        BackendError: SS4201 without a compiler, SS4202 where it takes no such flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "empty.c").write_text("")
        _run([find_compiler(), *flags(), *more, "-dM", "-E", "empty.c", "-o", "names.h"], work)
        lines = (work / "names.h").read_text().splitlines()
    words = [line.split(" ", 2)[1:] for line in lines if line.startswith("#define ")]
    return {name: "".join(value) for name, *value in words}


def _key(compiler: str, texts: Mapping[str, str]) -> str:
    names = (*INCLUDED, *chain(*_PARTS))
    ours = [(HERE / name).read_text() for name in names]
    parts = [*texts.values(), *ours, *flags(), compiler_version(compiler), cpu_identity()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(library: Path) -> bool:
    """Whether a cached library is there and has the hash that was written beside it."""
    try:
        return library.with_suffix(".sha256").read_text() == _digest(library)
    except OSError:
        return False


def _compile(compiler: str, texts: Mapping[str, str], work: Path) -> None:
    for name, text in texts.items():
        (work / name).write_text(text)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda name: _compile_one(compiler, work / name, work), texts))


def _link(compiler: str, objects: Sequence[str], work: Path) -> None:
    _run([compiler, "-shared", *objects, "-o", "kernels.so", "-lm", "-pthread"], work)


def _compile_one(compiler: str, file: Path, work: Path) -> None:
    """One object file. A crash of the compiler itself is tried once more without vectorizing."""
    command = [compiler, *flags(), "-I", str(HERE), "-c", file.name, "-o", f"{file.stem}.o"]
    try:
        _run(command, work)
    except BackendError as error:
        if "internal compiler error" not in error.where:
            raise
        (work / f"{file.stem}.retried").write_text(error.where)
        _run([*command, "-O1", "-fno-tree-vectorize"], work)


def _run(command: list[str], work: Path) -> None:
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode:
        first = "\n".join(done.stderr.splitlines()[:40])
        what = f"generated C does not build: {' '.join(command)}"
        raise BackendError("SS4202", what, first, "report this as a bug, with the emitted source")


def _publish(work: Path, folder: Path, product: str) -> None:
    """Moves a finished build into its place. Another process may have been faster; either is good.

    Files go one by one by rename, the hash last: a reader sees a whole entry or none.
    """
    folder.mkdir(exist_ok=True)
    for file in sorted(work.iterdir(), key=lambda f: f.suffix == ".sha256"):
        if file.suffix != ".o" or file.suffix == Path(product).suffix:
            os.replace(file, folder / file.name)
