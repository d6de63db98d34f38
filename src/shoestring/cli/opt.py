"""`shoestring opt`: a function as text in, passes by name, a function as text out."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from shoestring.ir import parse, print_function, verify
from shoestring.ir.errors import UsageError
from shoestring.passes.base import Pass, name_of
from shoestring.passes.pipeline import Pipeline, StepRecord
from shoestring.passes.registry import available, default_pipeline, find_pass, make_pass
from shoestring.runtime.plain import is_tuple

_SPEC = re.compile(r"(?P<name>\w+)(?:\{(?P<options>.*)\})?", re.DOTALL)


@dataclass(frozen=True)
class Opt:
    """Runs passes over a function in text form.

    Attributes:
        file: the function; `-` reads standard input.
        passes: names in order, with options as in `name{field=value,other=1.5}`; commas between
            passes are allowed. By default the pipeline of compile().
        out: a file for the result; by default it is printed.
        print_after: also print the function after each pass that changed it, to standard error.
        report: print what each pass did, to standard error.
        locs: print locations of the user's code.
        list: print the passes that there are, and end.
    """

    file: Positional[Path] = Path("-")
    passes: tuple[str, ...] = ()
    out: Path | None = None
    print_after: bool = False
    report: bool = False
    locs: bool = True
    list: bool = False

    def run(self) -> int:
        """Runs the passes; the exit code."""
        if self.list:
            print("\n".join(_describe(cls) for cls in available().values()))
            return 0
        passes = parse_passes(" ".join(self.passes)) if self.passes else default_pipeline()
        function = parse(_read(self.file))
        verify(function)
        after, records = Pipeline(passes).run(function)
        for record in records:
            self._tell(record)
        _write(self.out, print_function(after, locs=self.locs))
        return 0

    def _tell(self, record: StepRecord) -> None:
        if self.report or self.print_after:
            print(record, file=sys.stderr)
        if self.print_after and record.after is not record.before:
            text = print_function(record.after, locs=self.locs)
            print(f"// after {record.name}\n{text}", file=sys.stderr)


def parse_passes(text: str) -> list[Pass]:
    """The passes of a list such as `canonicalize, dead_code{keep=true}`.

    Raises:
        UsageError: SS7006 where the list is malformed.
        PassError: SS3001, SS3010 for an unknown pass or option.
    """
    return [_parse_pass(item) for item in _split(text, text)]


def _split(text: str, whole: str) -> list[str]:
    """The parts between commas and spaces that are not within braces, brackets or quotes."""
    parts: list[str] = [""]
    depth, quoted = 0, False
    for c in text:
        quoted ^= c == '"'
        depth += 0 if quoted else (c in "{[") - (c in "}]")
        if not quoted and depth == 0 and c in ", \n\t":
            parts.append("")
        else:
            parts[-1] += c
    if depth or quoted:
        raise _malformed(whole, "a closing brace, bracket or quote")
    return [p for p in parts if p]


def _parse_pass(item: str) -> Pass:
    m = _SPEC.fullmatch(item)
    if m is None:
        raise _malformed(item, "name or name{field=value}")
    options: dict[str, Any] = {}
    for part in _split(m["options"] or "", item):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise _malformed(item, f"field=value in place of {part!r}")
        options[key] = _value(value, item)
    types = {f.name: str(f.type) for f in fields(find_pass(m["name"]))}
    typed = {k: _as_type(v, types.get(k, ""), f"{k} of {m['name']}") for k, v in options.items()}
    return make_pass(m["name"], **typed)


def _as_type(value: Any, type_: str, what: str) -> Any:
    """The value as a field of that type, where the type is a simple one."""
    if type_.startswith("frozenset") and is_tuple(value):
        return frozenset(value)
    simple = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(type_)
    fits = simple is None or isinstance(value, simple)
    if not fits or (isinstance(value, bool) and type_ in ("int", "float")):
        raise UsageError("SS7006", f"reading --passes: {what} is of type {type_}, found {value!r}")
    return value


def _value(text: str, item: str) -> Any:
    """`true`, `false`, `none`, a number, `"text"`, a word, or `[a, b]` as a tuple."""
    words = {"true": True, "false": False, "none": None}
    if text in words:
        return words[text]
    if text.startswith("[") and text.endswith("]"):
        return tuple(_value(t, item) for t in _split(text[1:-1], item))
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if not text.replace(".", "_").replace("-", "_").isidentifier():
        raise _malformed(item, f"a value in place of {text!r}")
    return text


def _malformed(found: str, wanted: str) -> UsageError:
    return UsageError(
        "SS7006",
        f"reading --passes: {wanted} is required, found {found!r}",
        hint="for example --passes canonicalize dead_code",
    )


def _describe(cls: type[Pass]) -> str:
    options = ", ".join(f"{f.name}: {f.type}" for f in fields(cls))
    doc = (cls.__doc__ or "").strip().split("\n")[0]
    return f"{name_of(cls)}{{{options}}} [{cls.numerics.value}] {doc}".replace("{}", "")


def _read(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        what = f"reading a function: a readable text file is required: {error}"
        raise UsageError("SS7002", what, str(file)) from None


def _write(file: Path | None, text: str) -> None:
    if file is None:
        sys.stdout.write(text)
        return
    try:
        file.write_text(text)
    except OSError as error:
        what = f"writing a function: a writable file is required: {error.strerror}"
        raise UsageError("SS7002", what, str(file)) from None
