"""PyTorch's own operator samples (OpInfo) as a corpus: capture, run, compare with eager.

Each sample of an op is captured as one function: the op on the sample's tensors, and the gradients
of its differentiable results for fixed random cotangents. The functions of many samples are joined
into one, so that a backend compiles once an op.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from shoestring.ir import (
    Function,
    Op,
    Output,
    Param,
    Role,
    Tracer,
    Value,
    interpret,
    parse,
    print_function,
    same_structure,
    type_of,
    verify,
)
from shoestring.ir.errors import CaptureError, ShoestringError

# The first that an op supports is used.
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
# Results are uninitialised memory: sizes and types are all that can be compared.
UNINITIALISED = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
)
Runner = Callable[[Function, Sequence[torch.Tensor]], list[torch.Tensor]]


@dataclass
class Case:
    """One sample of an op: what to call, and its tensors.

    Attributes:
        call: the op.
        tensors: each distinct tensor among the arguments, in order.
        rebuild: the arguments with other tensors in place.
        defined: whether the results' elements are; those of `torch.empty` are not.
    """

    label: str
    call: Callable[..., Any]
    tensors: list[torch.Tensor]
    rebuild: Callable[[Sequence[torch.Tensor]], tuple[Any, dict[str, Any]]]
    defined: bool = True

    def run(
        self, tensors: Sequence[torch.Tensor], cotangents: Callable[[int, torch.Tensor], Any]
    ) -> tuple[list[torch.Tensor], list[Any]]:
        """All results and gradients, and the results that are no tensors."""
        args, kwargs = self.rebuild(tensors)
        flat = pytree.tree_leaves(self.call(*args, **kwargs))
        outputs = [t for t in flat if isinstance(t, torch.Tensor)]
        plain = [t for t in flat if not isinstance(t, torch.Tensor)]
        wanted = [t for t in tensors if t.requires_grad]
        roots = [t for t in outputs if t.requires_grad]
        grads: Sequence[torch.Tensor | None] = ()
        if wanted and roots:
            given = [cotangents(i, t) for i, t in enumerate(roots)]
            grads = torch.autograd.grad(roots, wanted, given, allow_unused=True)
        return [*outputs, *(g for g in grads if g is not None)], plain


@dataclass
class Captured:
    """A sample's function, what it is called with, and what eager PyTorch gives."""

    case: Case
    function: Function
    arguments: list[torch.Tensor]
    expected: list[torch.Tensor]
    written: dict[str, torch.Tensor]

    @property
    def is_random(self) -> bool:
        return any(op.name.startswith("rng.") for op in self.function.ops)


@dataclass
class Verdict:
    """What became of one op."""

    name: str
    samples: int = 0
    passed: int = 0
    random: int = 0
    skipped: int = 0
    refused: list[str] = field(default_factory=list[str])
    mismatches: list[str] = field(default_factory=list[str])
    texts: int = 0


def ops() -> list[Any]:
    """Every OpInfo, in PyTorch's order."""
    return list(op_db)


def dtype_of(info: Any) -> torch.dtype | None:
    """The element type that an op's samples are made with; None: it has no CPU kernel."""
    supported = info.supported_dtypes("cpu")
    return next((d for d in DTYPES if d in supported), None)


def cases(info: Any, limit: int | None = None) -> Iterator[Case]:
    """The op's samples, always the same."""
    dtype = dtype_of(info)
    if dtype is None:
        return
    torch.default_generator.manual_seed(0)
    grad = bool(info.supports_autograd) and (dtype.is_floating_point or dtype.is_complex)
    grad = grad and dtype in info.supported_backward_dtypes("cpu")
    for index, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=grad)):
        if limit is not None and index >= limit:
            return
        args = (sample.input, *sample.args)
        case = make_case(f"{info.formatted_name}[{index}]", info.op, args, sample.kwargs)
        case.defined = info.name not in UNINITIALISED
        yield case


def make_case(label: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Case:
    """A call taken apart into its distinct tensors and all else."""
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    distinct = {id(t): t for t in flat if isinstance(t, torch.Tensor)}
    index = {key: i for i, key in enumerate(distinct)}

    def rebuild(tensors: Sequence[torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        leaves = [tensors[index[id(t)]] if isinstance(t, torch.Tensor) else t for t in flat]
        new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
        return new_args, new_kwargs

    return Case(label, call, list(distinct.values()), rebuild)


def capture(case: Case) -> Captured | None:
    """The sample as a function; None where eager PyTorch itself fails on it.

    Raises:
        CaptureError: where shoestring refuses it.
    """
    arguments = [_copy(t) for t in case.tensors]
    generator = torch.Generator().manual_seed(7)
    cotangents: list[torch.Tensor] = []

    def make(index: int, result: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(result.shape, dtype=torch.float64, generator=generator)
        cotangents.append(noise.to(result.dtype))
        return cotangents[-1]

    leaves = [t.detach().requires_grad_(t.requires_grad) for t in case.tensors]
    versions = [t._version for t in leaves]
    torch.default_generator.manual_seed(1)
    try:
        expected, plain = case.run(leaves, make)
    except _EAGER_ERRORS:
        return None
    function = _trace(case, cotangents, plain)
    written = {
        f"in{i}": leaf.detach().clone()
        for i, (leaf, version) in enumerate(zip(leaves, versions, strict=True))
        if leaf._version != version
    }
    expected = [t.detach().clone() for t in expected]
    return Captured(case, function, [*arguments, *cotangents], expected, written)


def _trace(case: Case, cotangents: Sequence[torch.Tensor], plain: list[Any]) -> Function:
    tracer = Tracer("sample", lambda t: (Role.CONSTANT, f"#constant.{len(tracer.params)}"))
    for t in case.tensors:
        if t.layout is not torch.strided:
            raise CaptureError("SS1012", f"a {t.layout} tensor is not supported")
    inputs = [
        tracer.input(type_of(t), Role.BATCH, f"in{i}", requires_grad=t.requires_grad)
        for i, t in enumerate(case.tensors)
    ]
    given = [
        tracer.input(type_of(t), Role.BATCH, f"cotangent{i}") for i, t in enumerate(cotangents)
    ]
    torch.default_generator.manual_seed(1)
    try:
        with tracer:
            results, found = case.run(inputs, lambda i, _: given[i])
            function = tracer.finish([(f"out{i}", t.detach()) for i, t in enumerate(results)])
    except _EAGER_ERRORS as error:
        raise tracer.refusal_of(error) from error
    if any(op.name == "aten.as_strided.default" for op in function.ops):
        _refuse_windows(case.tensors)
    if repr(found) != repr(plain):
        raise CaptureError("SS1004", f"{found} instead of {plain}")
    return function


def _refuse_windows(tensors: Sequence[torch.Tensor]) -> None:
    """A value is its elements: `as_strided` cannot reach what lies around them in memory."""
    for t in tensors:
        if t.untyped_storage().nbytes() != t.numel() * t.itemsize:
            raise CaptureError("SS1013", "as_strided reaches beyond the tensor that it is given")


# What PyTorch raises where it lacks a kernel or refuses arguments; the tracer passes it on.
_EAGER_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements with the same strides, apart from the original."""
    return tensor.detach().clone()


def join(captured: Sequence[Captured], name: str) -> tuple[Function, list[torch.Tensor]]:
    """One function that computes every sample, and its arguments."""
    params: list[Param] = []
    ops_: list[Op] = []
    outputs: list[Output] = []
    arguments: list[torch.Tensor] = []
    for number, c in enumerate(captured):
        prefix = f"s{number}."
        f = renamed(c.function, prefix)
        params += [replace(p, path=f"#{prefix}{p.path}") for p in f.params]
        ops_ += f.ops
        outputs += [Output(f"{prefix}{o.name}", o.value) for o in f.outputs]
        arguments += bind(c)
    return Function(name, tuple(params), tuple(ops_), tuple(outputs)), arguments


def renamed(function: Function, prefix: str) -> Function:
    """The same function of other values."""
    table = {v: Value(v.type, prefix + v.name) for v in function.values}
    ops_ = [
        replace(op.map_operands(table.__getitem__), results=tuple(table[r] for r in op.results))
        for op in function.ops
    ]
    params = [
        replace(p, value=table[p.value], next=None if p.next is None else table[p.next])
        for p in function.params
    ]
    outputs = [Output(o.name, table[o.value]) for o in function.outputs]
    return Function(function.name, tuple(params), tuple(ops_), tuple(outputs))


def bind(c: Captured, seed: int = 11) -> list[torch.Tensor]:
    """One fresh tensor a parameter."""
    rest = iter(c.arguments)
    found: list[torch.Tensor] = []
    for p in c.function.params:
        if p.role is Role.RNG:
            found.append(torch.tensor([seed, 0]))
        else:
            found.append(next(rest).clone())
    return found


@dataclass(frozen=True)
class Tolerance:
    """How far results may be from eager PyTorch's.

    Attributes:
        relative: of each element.
        absolute: of each element.
        scale: of the largest element of the tensor: sums of terms that cancel, in another order.
    """

    relative: float = 1.3e-6
    absolute: float = 1e-5
    scale: float = 0.0


EXACT = Tolerance()
REASSOCIATED = Tolerance(1e-5, 1e-5, 2e-6)


def differs(found: torch.Tensor, wanted: torch.Tensor, tolerance: Tolerance = EXACT) -> str:
    """What is wrong with `found`, or nothing."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{type_of(found)} instead of {type_of(wanted)}"
    if not wanted.numel():
        return ""
    if not (wanted.dtype.is_floating_point or wanted.dtype.is_complex):
        return "" if torch.equal(found, wanted) else "other integers"
    wide = torch.complex128 if wanted.dtype.is_complex else torch.float64
    a, b = found.to(wide), wanted.to(wide)
    finite = b.abs()[b.abs().isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    atol = tolerance.absolute + tolerance.scale * largest
    close = torch.isclose(a, b, rtol=tolerance.relative, atol=atol, equal_nan=True)
    if bool(close.all()):
        return ""
    error = (a - b).abs()[~close]
    return f"{int((~close).sum())} of {close.numel()} elements, by up to {error.max():.3g}"


def check_text(function: Function) -> None:
    """The function verifies, and its text gives it back."""
    verify(function)
    text = print_function(function)
    again = parse(text)
    assert same_structure(function, again), "parsed text is another function"
    assert print_function(again) == text, "parsed text prints differently"


def check_op(
    info: Any,
    run: Runner,
    limit: int | None = None,
    *,
    tolerance: Tolerance = EXACT,
    text: bool = True,
    chunk: int = 100,
) -> Verdict:
    """Captures and compares every sample of an op."""
    verdict = Verdict(info.formatted_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = capture_op(info, verdict, limit, text)
        for start in range(0, len(ready), chunk):
            compare(ready[start : start + chunk], run, tolerance, verdict)
    return verdict


def capture_op(info: Any, verdict: Verdict, limit: int | None, text: bool) -> list[Captured]:
    """Every sample of an op that can be captured; the verdict counts the others."""
    ready: list[Captured] = []
    for case in cases(info, limit):
        verdict.samples += 1
        captured = _attempt(case, verdict, text)
        if captured is not None:
            ready.append(captured)
    return ready


def first_refusal(info: Any) -> str:
    """Why the first refused sample of an op is refused; nothing where every sample is captured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases(info):
            verdict = Verdict(info.formatted_name)
            _attempt(case, verdict, text=False)
            if verdict.refused:
                return verdict.refused[0]
    return ""


def _attempt(case: Case, verdict: Verdict, text: bool) -> Captured | None:
    try:
        captured = capture(case)
    except CaptureError as error:
        verdict.refused.append(f"{case.label}: [{error.code}] {error.what}")
        return None
    if captured is None:
        verdict.skipped += 1
        return None
    if text:
        try:
            check_text(captured.function)
        except (AssertionError, ShoestringError) as error:
            verdict.mismatches.append(f"{case.label}: text: {str(error)[:400]}")
        verdict.texts += 1
    return captured


def compare(group: list[Captured], run: Runner, tolerance: Tolerance, verdict: Verdict) -> None:
    """Runs samples as one function and notes in the verdict what differs from eager."""
    function, arguments = join(group, "samples")
    try:
        found = iter(run(function, arguments))
    except Exception as error:  # whatever it is, it is a defect of the backend
        what = f"{group[0].case.label}...: {type(error).__name__}: {str(error)[:300]}"
        verdict.mismatches.append(what)
        return
    places = dict(zip((p.path for p in function.params), arguments, strict=True))
    for number, c in enumerate(group):
        outputs = [next(found) for _ in c.function.outputs]
        written = [(p, places[f"#s{number}.{p}"], w) for p, w in c.written.items()]
        wrong = list(differences(c, outputs, written, tolerance))
        verdict.random += c.is_random
        verdict.passed += not wrong
        verdict.mismatches += [f"{c.case.label}: {w}" for w in wrong]


Written = tuple[str, torch.Tensor, torch.Tensor]


def differences(
    c: Captured, outputs: list[torch.Tensor], written: list[Written], tolerance: Tolerance
) -> Iterator[str]:
    """How results differ from eager PyTorch's; random ones, from the interpreter's."""
    if len(outputs) != len(c.expected):
        yield f"{len(outputs)} results instead of {len(c.expected)}"
        return
    wanted = c.expected
    if c.is_random:
        wanted, nexts = interpret(c.function, bind(c))
        written = [(path, now, nexts[path]) for path, now, _ in written]
    for i, (found, eager, value) in enumerate(zip(outputs, c.expected, wanted, strict=True)):
        if type_of(found) != type_of(eager):
            yield f"out{i}: {type_of(found)} instead of {type_of(eager)}"
        elif c.case.defined:
            what = differs(found, value, tolerance)
            if what and (c.is_random or not no_worse(c, i, found)):
                yield f"out{i}: {what}"
    for path, now, value in written:
        what = differs(now, value, tolerance)
        if what:
            yield f"{path} after: {what}"


def no_worse(c: Captured, index: int, found: torch.Tensor) -> bool:
    """Whether a result is as near to double precision as eager PyTorch's own single precision.

    So an ill-conditioned sample, whose digits hang on the order of sums, is no mismatch.
    """
    case = c.case
    if not case.tensors or not (found.dtype.is_floating_point or found.dtype.is_complex):
        return False
    tensors = [
        _double(t).requires_grad_(old.requires_grad)
        for t, old in zip(c.arguments, case.tensors, strict=False)
    ]
    cotangents = [_double(t) for t in c.arguments[len(tensors) :]]
    try:
        exact = case.run(tensors, lambda i, _: cotangents[i])[0][index]
    except _EAGER_ERRORS:  # no kernel for double precision, or no such result
        return False
    eager = c.expected[index]
    if exact.dtype != _double(eager).dtype or exact.shape != eager.shape:
        return False
    return _error(found, exact) <= 2 * _error(eager, exact)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return tensor.detach().to(wide.get(tensor.dtype, tensor.dtype), copy=True)


def _error(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    error = (_double(tensor) - exact.detach()).abs()
    return float(error.max()) if error.numel() else 0.0


def kept(total: int, percent: float) -> int:
    """How many of `total` are `percent` percent, rounded down."""
    return math.floor(total * percent / 100)
