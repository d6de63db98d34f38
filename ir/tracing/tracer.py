"""Records what a torch program does, as a function of the IR.

`Tracer` is a dispatch mode: it sees every ATen call that the user's code, autograd and hooks make,
runs it on fake tensors (sizes and types, no data) and appends an `Op`. Views and in-place writes
become values (`aliasing.py`); random operators become `rng.*` (`randomness.py`). Real tensors met
on the way are turned into parameters by the `adopt` callback of whoever drives the trace.
"""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as no_modes

from ..errors import CaptureError, ShoestringError
from ..fake import empty
from ..fake import fake_mode as new_fake_mode
from ..function import Function, Op, Operand, Output, Param, Role, Value, map_operand, map_types
from ..interpreter import run_op
from ..opdef import as_tuple, results_of
from ..ops import find_overload, lookup, overload_name, split_arguments
from ..types import TensorType, type_of
from .aliasing import Record, Step, Storage, read, write
from .location import Locator, is_own_file, is_user_file
from .randomness import SAMPLERS
from .replay import Recording, layouts
from .results import Results
from .special import FAKE_RESULTS, REWRITES

INLINE_ELEMENTS = 64
Adopt = Callable[[torch.Tensor], tuple[Role, str]]


class Tracer(TorchDispatchMode):
    """Builds one function from the ATen calls made while it is active.

    Args:
        name: the function's name.
        adopt: called with each real tensor that is met and not yet known; gives the role and
            path of the parameter that stands for it.
        fake_mode: the mode of the user's own fake tensors, where the model has no data.
    """

    def __init__(
        self, name: str, adopt: Adopt | None = None, fake_mode: FakeTensorMode | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        self.name = name
        self.fake = fake_mode or new_fake_mode()
        self.locator = Locator()
        self.params: list[Param] = []
        self.bound: list[torch.Tensor | None] = []
        self.ops: list[Op] = []
        self.touched: dict[Value, torch.Tensor] = {}  # sparse gradient -> mask of its rows
        self._adopt = adopt or _refuse_unknown
        self._records: dict[int, Record] = {}
        self._param_records: dict[Value, Record] = {}
        self._by_memory: dict[Any, Record] = {}
        self._producers: dict[Value, Op] = {}
        self._key: Value | None = None
        self._results = Results(self.fake)
        self._types: dict[Any, tuple[TensorType, ...]] = {}
        self._sites: dict[str, int] = {}
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps a wrapper, and an import of the whole of dynamo, out of every call."""
        return False

    # -- inputs and outputs ------------------------------------------------------------------

    def input(
        self,
        type_: TensorType,
        role: Role,
        path: str,
        *,
        requires_grad: bool = False,
        like: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A new parameter, as a tensor without data that can be handed to the user's code.

        Its strides are those of `like`: whether `reshape` copies hangs on them, and so what a
        write in place reaches. Without `like` it is in row-major order.
        """
        tensor = self._empty(type_) if like is None else self._twin(like)
        if requires_grad:
            tensor.requires_grad_()
        self._new_param(tensor, tensor, role, path, None)
        return tensor

    def adopt(self, tensor: torch.Tensor, role: Role, path: str) -> Value:
        """Makes a real tensor a parameter; operations on it are recorded from now on."""
        return self._new_param(tensor, self._twin(tensor), role, path, tensor)

    def read(self, tensor: torch.Tensor) -> Value:
        """The value that a tensor holds now."""
        return read(self._record_of(tensor), self._emit_one)

    def assign(self, param: Value, value: Value) -> None:
        """Gives a parameter its value after the step."""
        write(self._param_records[param], value, self._emit_one)

    def emit(self, name: str, *operands: Operand, **attrs: Any) -> torch.Tensor:
        """Appends an op of the IR and returns its result as a tensor without data."""
        return self._tensor(self._emit_one(name, *operands, **attrs))

    def layouts(self, tensors: Sequence[torch.Tensor]) -> object | None:
        """What ops on the tensors depend on; None where some share memory (`replay.layouts`)."""
        return layouts(tensors, [self._record_of(t) for t in tensors])

    def record(
        self, tensors: Sequence[torch.Tensor], work: Callable[[], object]
    ) -> Recording | None:
        """Does `work`; what it did to the tensors, where the same can be done to others."""
        before = tuple([self.read(t) for t in tensors])  # of a stale view, with ops of its own
        start, known = len(self.ops), len(self.params)
        work()
        made = Recording(tuple(self.ops[start:]), before, tuple([self.read(t) for t in tensors]))
        repeats = made.repeats([self._record_of(t) for t in tensors])
        return made if repeats and len(self.params) == known else None

    def replay(self, recording: Recording, tensors: Sequence[torch.Tensor]) -> None:
        """Does the same to other tensors, of equal `layouts`."""
        new = dict(zip(recording.before, [self.read(t) for t in tensors], strict=True))
        for op in recording.ops:
            operands = tuple([map_operand(o, lambda v: new.get(v, v)) for o in op.operands])
            results = tuple([self._fresh(v.type) for v in op.results])
            self._add(Op(op.opdef, operands, op.attrs, results, op.loc))
            new.update(zip(op.results, results, strict=True))
        for t, before, after in zip(tensors, recording.before, recording.after, strict=True):
            if after is not before:
                write(self._record_of(t), new.get(after, after), self._emit_one)

    def rng_key(self) -> Value:
        """The key parameter of the program's randomness, made when first asked for."""
        if self._key is None:
            type_ = TensorType(torch.int64, (2,))
            self._key = self.read(self.input(type_, Role.RNG, "#rng"))
        return self._key

    def finish(self, outputs: Sequence[tuple[str, torch.Tensor]]) -> Function:
        """The function; state that was written to has its next value. The trace is over."""
        if self._key is not None:
            self.assign(self._key, self._emit_one("rng.advance.default", self._key))
        results = tuple(Output(name, self.read(t)) for name, t in outputs)
        params = tuple(self._final(p) for p in self.params)
        self._forget()
        return Function(self.name, params, tuple(self.ops), results)

    def _forget(self) -> None:
        """Lets go of all tensors now: a tracer and what it met hold each other."""
        self._records.clear()
        self._param_records.clear()
        self._by_memory.clear()
        self._producers.clear()

    def _final(self, p: Param) -> Param:
        storage = self._param_records[p.value].storage
        next_ = storage.base if storage.version else None
        return Param(p.value, p.role, p.path, None if next_ is p.value else next_)

    # -- randomness --------------------------------------------------------------------------

    def draw(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uniform numbers in [0, 1)."""
        attrs = {"site": self._site, "shape": tuple(shape), "dtype": dtype}
        return self.emit("rng.uniform.default", self.rng_key(), **attrs)

    def bits(self, shape: Sequence[int]) -> torch.Tensor:
        """32 random bits an element."""
        return self.emit("rng.bits.default", self.rng_key(), site=self._site, shape=tuple(shape))

    @property
    def _site(self) -> int:
        """The number of the current draw.

        The state of PyTorch's generator names a draw. So code that restores the state, as
        activation checkpointing does before it recomputes, draws the same numbers again.
        """
        with no_modes():
            state = hashlib.sha256(bytes(torch.default_generator.get_state().numpy())).hexdigest()
            torch.rand(())
        return self._sites.setdefault(state, len(self._sites))

    # -- dispatch ----------------------------------------------------------------------------

    def __exit__(self, *error: Any) -> None:
        self.locator.forget()
        super().__exit__(*error)  # type: ignore[no-untyped-call] # PyTorch gives it no types

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # most calls of a backward pass
            return args[0].fake_device
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise self.refusal("SS1003", f"the operator {func.name()} is not supported")
        try:
            return self._dispatch(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            what = f"{overload_name(func)} has a result whose size or value depends on data"
            raise self.refusal("SS1002", what, _DATA_DEPENDENT) from error
        except UnsupportedOperatorException as error:
            raise self.refusal("SS1003", f"{func} has no rule for sizes and types") from error

    def _dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = overload_name(func)
        if func.namespace == "prim":
            return self._run_fake(name, func, args, kwargs)
        if name in SAMPLERS:
            return self._sample(name, func, args, kwargs)
        if name in REWRITES:
            with self:
                outcome = REWRITES[name](self, *args, **kwargs)
            if outcome is not NotImplemented:
                return outcome
        if _is_composite(func):
            with self:
                outcome = func.decompose(*args, **kwargs)
            if outcome is not NotImplemented:
                return outcome
        if not _returns_tensors(func):
            return self._query(name, func, args, kwargs)
        if _is_random(func, args, kwargs):
            raise self.refusal("SS1003", f"the random operator {name} has no rule")
        if torch.Tag.inplace_view in func.tags:
            return self._change_metadata(name, func, args, kwargs)
        written = _written(func, args, kwargs)
        if written:
            return self._mutate(name, func, args, kwargs, written)
        if func.is_view:
            return self._view(name, func, args, kwargs)
        return self._pure(name, func, args, kwargs)

    def _pure(self, name: str, func: OpOverload, args: Any, kwargs: Any) -> Any:
        operands, attrs = split_arguments(func, args, kwargs)
        values = tuple(self._operand(o) for o in operands)
        outcome = self._run_fake(name, func, args, kwargs)
        tensors = results_of(outcome, attrs)
        for t in tensors:
            if t.layout is not torch.strided:
                raise self.refusal("SS1012", f"{name} makes a {t.layout} tensor")
        op = self._append(name, values, attrs, tuple(type_of(t) for t in tensors))
        for t, v in zip(tensors, op.results, strict=True):
            self._records[id(t)] = Record(t, Storage(t, v), (), v)
        if "output_mask" in attrs and isinstance(outcome, tuple):
            return tuple([t if id(t) in self._records else None for t in outcome])
        return outcome

    def _run_fake(self, name: str, func: OpOverload, args: Any, kwargs: Any) -> Any:
        fake_args, fake_kwargs = self._to_fake(args), self._to_fake(kwargs)

        def run() -> Any:
            with self.fake:
                return FAKE_RESULTS.get(name, func)(*fake_args, **fake_kwargs)

        if func.is_view:
            return self._results.of_view(func, fake_args, fake_kwargs, run)
        return self._results.of(func, fake_args, fake_kwargs, run)

    def _view(self, name: str, func: OpOverload, args: Any, kwargs: Any) -> Any:
        source = self._record_of(args[0])
        outcome = self._run_fake(name, func, args, kwargs)
        if name in ("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default"):
            value = read(source, self._emit_one)
            view = Record(outcome, source.storage, source.chain, value, source.storage.version)
            self._records[id(outcome)] = view
            return outcome
        if name == "aten.as_strided.default":
            return self._view_of_memory(source, outcome)
        if isinstance(outcome, torch.Tensor):
            _, attrs = split_arguments(func, args, kwargs)
            step = Step(_SAME_VIEW.get(name, name), _view_attrs(attrs, outcome), type_of(args[0]))
            self._add_view(source, outcome, (step,))
            return outcome
        pieces = _pieces(name, func, args, kwargs, outcome)
        for piece, (part, attrs) in zip(outcome, pieces, strict=True):
            self._add_view(source, piece, (Step(part, attrs, type_of(source.tensor)),))
        return outcome

    def _add_view(self, source: Record, outcome: torch.Tensor, steps: tuple[Step, ...]) -> None:
        value = read(source, self._emit_one)
        for step in steps[:-1]:
            value = self._emit_one(step.name, value, **step.attrs)
        value = self._append(steps[-1].name, (value,), steps[-1].attrs, (type_of(outcome),)).result
        storage, chain = source.storage, (*source.chain, *steps)
        self._records[id(outcome)] = Record(outcome, storage, chain, value, storage.version)

    def _view_of_memory(self, source: Record, outcome: torch.Tensor) -> torch.Tensor:
        """`as_strided`: the root in the order of its memory, then counted by strides."""
        root = source.storage.root
        strides = root.stride()
        order = sorted(range(root.dim()), key=lambda d: (-strides[d], d))
        ordered = root.permute(order) if order != list(range(root.dim())) else root
        if not ordered.is_contiguous():
            raise self.refusal("SS1013", "as_strided of a tensor with gaps in memory")
        steps: list[Step] = []
        if ordered is not root:
            steps.append(Step("aten.permute.default", {"dims": tuple(order)}, type_of(root)))
        offset = int(outcome.storage_offset()) - int(root.storage_offset())
        reach = sum((n - 1) * st for n, st in zip(outcome.shape, outcome.stride(), strict=True))
        if outcome.numel() and not 0 <= offset <= offset + reach < root.numel():
            raise self.refusal("SS1013", "as_strided reaches beyond the tensor that it is given")
        attrs = {
            "size": tuple(outcome.shape),
            "stride": tuple(outcome.stride()),
            "storage_offset": offset,
        }
        steps.append(Step("aten.as_strided.default", attrs, type_of(ordered)))
        whole = Record(root, source.storage, (), source.storage.base, source.storage.version)
        self._add_view(whole, outcome, tuple(steps))
        return outcome

    def _mutate(
        self, name: str, func: OpOverload, args: Any, kwargs: Any, written: list[torch.Tensor]
    ) -> Any:
        if name == "aten.copy_.default":
            self._store(args[0], self.read(self._known(args[1])))
            return args[0]
        pure = functional_variant(name)
        if pure is None:
            raise self.refusal("SS1003", f"{name} writes in place in a way that has no rule")
        inputs, keywords = _without_outputs(func, pure, args, kwargs)
        with self:
            outcome = pure(*inputs, **keywords)
        fresh = [t for t in as_tuple(outcome) if t is not None]
        for target, new in zip(written, fresh[len(fresh) - len(written) :], strict=True):
            self._store(target, self.read(new))
        if len(fresh) > len(written):
            rest: list[Any] = [*fresh[: len(fresh) - len(written)]]
            return rest[0] if len(rest) == 1 else tuple(rest)
        return written[0] if len(func._schema.returns) == 1 else tuple(written)

    def _store(self, target: torch.Tensor, value: Value) -> None:
        """Writes a value into a tensor, cast and broadcast as in-place operations do."""
        wanted = type_of(target)
        if value.type.dtype != wanted.dtype:
            value = self._emit_one("aten._to_copy.default", value, dtype=wanted.dtype)
        if value.type.shape != wanted.shape:
            if value.type.rank > wanted.rank and value.type.numel == wanted.numel:
                value = self._emit_one("aten.view.default", value, size=wanted.shape)
            else:
                value = self._emit_one("aten.expand.default", value, size=wanted.shape)
        write(self._record_of(target), value, self._emit_one)

    def _change_metadata(self, name: str, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """`squeeze_`, `t_` and the like: the same tensor, seen through one more view."""
        target = args[0]
        record = self._record_of(target)
        pure = functional_variant(name)
        if pure is None or not isinstance(target, FakeTensor):
            raise self.refusal("SS1003", f"{name} is not supported on this tensor")
        before = type_of(target)
        read(record, self._emit_one)
        with self.fake:
            func(*args, **kwargs)
        _, attrs = split_arguments(pure, args, kwargs)
        step = Step(overload_name(pure), attrs, before)
        record.value = self._emit_one(step.name, record.value, **step.attrs)
        record.chain = (*record.chain, step)
        return target

    def _sample(self, name: str, func: OpOverload, args: Any, kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory")}
        with self:
            outcome = SAMPLERS[name](self, *args, **kwargs)
        written = _written(func, args, kwargs)
        if name == "aten.rrelu_with_noise_.default":
            self._store(args[0], self.read(outcome[0]))
        if name.startswith("aten.rrelu"):
            self._store(args[1], self.read(outcome[1]))
            return written[0] if len(written) == 2 else outcome[0]
        if not written:
            return outcome
        assert isinstance(outcome, torch.Tensor), "what is written in place is one tensor"
        self._store(written[0], self.read(outcome))
        return written[0]

    def _query(self, name: str, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Sizes, strides and the like; or the value of a tensor, if the program fixes it."""
        if name in ("aten._local_scalar_dense.default", "aten.is_nonzero.default"):
            known = self.constant(self.read(args[0]))
            if known is None:
                raise self.refusal("SS1001", "Python reads a tensor's value here", _READS_VALUE)
            return known.item() if name.startswith("aten._local") else bool(known.item())
        if name == "aten.equal.default":
            pair = [self.constant(self.read(t)) for t in args[:2]]
            if pair[0] is None or pair[1] is None:
                raise self.refusal("SS1001", "Python compares two tensors here", _READS_VALUE)
            return torch.equal(pair[0], pair[1])
        if name.startswith("aten._assert") or name == "aten.sym_constrain_range.default":
            return None
        return self._run_fake(name, func, args, kwargs)

    # -- values ------------------------------------------------------------------------------

    def constant(self, value: Value) -> torch.Tensor | None:
        """The value's data, where it follows from the program alone; None otherwise."""
        needed: dict[Value, Op] = {}
        stack = [value]
        while stack:
            v = stack.pop()
            if v in needed:
                continue
            op = self._producers.get(v)
            if op is None or op.name.startswith("rng."):
                return None
            needed[v] = op
            stack.extend(op.inputs)
        env: dict[Value, torch.Tensor] = {}
        wanted = set(needed.values())
        with no_modes():
            for op in self.ops:
                if op in wanted:
                    env.update(zip(op.results, run_op(op, env), strict=True))
        return env[value]

    def producer(self, value: Value) -> Op | None:
        """The op that makes a value; None for a parameter."""
        return self._producers.get(value)

    def _emit_one(self, name: str, *operands: Operand, **attrs: Any) -> Value:
        op = self._append(name, operands, attrs, None)
        return op.result

    def _append(
        self,
        name: str,
        operands: tuple[Operand, ...],
        attrs: dict[str, Any],
        types: tuple[TensorType, ...] | None,
    ) -> Op:
        opdef = lookup(name)
        given = {**opdef.attr_defaults, **attrs}
        loc = self.locator.here()
        if types is None:
            types = self._infer(Op(opdef, operands, given, (), loc))
        op = Op(opdef, operands, given, tuple([self._fresh(t) for t in types]), loc)
        self._add(op)
        return op

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        self._producers.update((r, op) for r in op.results)

    def _infer(self, draft: Op) -> tuple[TensorType, ...]:
        operands = map_types(draft.operands)
        key = (draft.name, operands, tuple([(k, type(v), v) for k, v in draft.attrs.items()]))
        types = self._types.get(key)
        if types is None:
            with no_modes():
                types = self._types[key] = draft.opdef.infer(draft)
        return types

    def _fresh(self, type_: TensorType) -> Value:
        self._count += 1
        return Value(type_, str(self._count - 1))

    def _tensor(self, value: Value) -> torch.Tensor:
        tensor = self._empty(value.type)
        self._records[id(tensor)] = Record(tensor, Storage(tensor, value), (), value)
        return tensor

    def _empty(self, type_: TensorType) -> torch.Tensor:
        return empty(self.fake, type_.dtype, type_.static_shape, None)

    def _operand(self, given: Any) -> Operand:
        if isinstance(given, torch.Tensor):
            return self.read(given)
        if isinstance(given, tuple):
            return tuple(None if t is None else self.read(t) for t in given)
        number: Operand = given
        return number

    def share_storage(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether writing one of two tensors may change the other."""
        return self._record_of(a).storage is self._record_of(b).storage

    def _record_of(self, tensor: torch.Tensor) -> Record:
        record = self._records.get(id(tensor))
        if record is not None:
            return record
        twin = self._by_memory.get(memory_of(tensor))
        if twin is not None:  # another tensor object on the same memory, such as `weight.data`
            twin.keep.append(tensor)
            self._records[id(tensor)] = twin
            return twin
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake:
            role, path = self._adopt(tensor)
            self._new_param(tensor, tensor, role, path, tensor)
        else:
            role, path = self._adopt(tensor)
            self.adopt(tensor, role, path)
        return self._records[id(tensor)]

    def _known(self, tensor: torch.Tensor) -> torch.Tensor:
        self._record_of(tensor)
        return tensor

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor made by `torch.tensor(...)` in the user's code, as a value."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.numel() <= INLINE_ELEMENTS and not tensor.is_complex():
            with no_modes():
                data = tuple(tensor.detach().flatten().tolist())
            attrs = {"data": data, "shape": tuple(tensor.shape), "dtype": tensor.dtype}
            return self.emit("ir.constant.default", **attrs)
        path = f"#literal.{len(self.params)}"
        with no_modes():
            copy = tensor.detach().clone()
        return self._tensor(self.adopt(copy, Role.CONSTANT, path))

    def _new_param(
        self,
        tensor: torch.Tensor,
        twin: torch.Tensor,
        role: Role,
        path: str,
        bound: torch.Tensor | None,
    ) -> Value:
        value = Value(type_of(tensor), f"{role.value}.{len(self.params)}")
        self.params.append(Param(value, role, path))
        self.bound.append(bound)
        record = Record(twin, Storage(twin, value), (), value, keep=[tensor])
        self._records[id(tensor)] = self._records[id(twin)] = record
        self._param_records[value] = record
        self._by_memory[memory_of(tensor)] = record
        return value

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in _PLAIN and not isinstance(tensor, FakeTensor):
            what = f"a tensor of type {type(tensor).__name__} is not supported"
            raise self.refusal("SS1011", what, "use plain torch.Tensor parameters and buffers")
        if tensor.layout is not torch.strided:
            raise self.refusal("SS1012", f"a {tensor.layout} tensor is not supported")
        return empty(self.fake, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def _to_fake(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            return self._record_of(given).tensor
        if isinstance(given, (list, tuple)):
            return type(given)(self._to_fake(g) for g in given)  # pyright: ignore
        if isinstance(given, dict):
            return {k: self._to_fake(v) for k, v in given.items()}  # pyright: ignore
        return given

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the traced program has met the tensor."""
        return id(tensor) in self._records

    def untraced(self) -> AbstractContextManager[Any]:
        """A context in which torch works on real data, unseen."""
        return no_modes()

    def is_ours(self, error: Exception) -> bool:
        """Whether the error is a defect of shoestring: raised in its own code, by Python."""
        frames = traceback.extract_tb(error.__traceback__)
        return bool(frames) and is_own_file(frames[-1].filename)

    def refusal_of(self, error: Exception) -> CaptureError:
        """What PyTorch complained about while the program was traced, at the user's line."""
        frames = traceback.extract_tb(error.__traceback__)
        user = [f for f in frames if is_user_file(f.filename)]
        where = f"{user[-1].filename}:{user[-1].lineno}" if user else ""
        message = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, NotImplementedError) and (found := _HIGHER_ORDER.search(message[0])):
            what = f"the control-flow operator {found[1]} is not supported"
            return CaptureError("SS1003", what, where, "use torch.where, or Python's own loops")
        if "data is not allocated yet" in message[0]:
            what = "PyTorch reads a tensor's value here"
            return CaptureError("SS1001", what, where, _READS_VALUE)
        what = f"the program failed while it was traced: {message[0]}"
        return CaptureError("SS1004", what, where, "" if user else CALLED_AS)

    def refusal(self, code: str, what: str, hint: str = "") -> CaptureError:
        return CaptureError(code, what, str(self.locator.here()), hint)


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    where = tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    return (where, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


CALLED_AS = "a loss is called as loss_fn(model, *batch), a model as model(*example_inputs)"
_HIGHER_ORDER = re.compile(r"no rule registered for HigherOrderOperator (\w+)")
_DEVICE: OpOverload = torch.ops.prim.device.default
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SAME_VIEW = {"aten._reshape_alias.default": "aten.view.default"}
_READS_VALUE = (
    "the program is captured without data: use torch.where, or compute the value outside the "
    "step and pass it as a Python number"
)
_DATA_DEPENDENT = "keep sizes independent of values: torch.where or a mask instead of an index list"


def _refuse_unknown(tensor: torch.Tensor) -> tuple[Role, str]:
    raise CaptureError("SS1015", "a tensor that is not an argument is used in a traced function")


def _view_attrs(attrs: dict[str, Any], outcome: torch.Tensor) -> dict[str, Any]:
    """Sizes as they are, -1 resolved; strides, which a value does not have, left out."""
    if not isinstance(attrs.get("size"), tuple):
        return attrs
    kept = {k: v for k, v in attrs.items() if k != "stride"}
    return {**kept, "size": tuple(int(n) for n in outcome.shape)}


@cache
def _is_composite(func: OpOverload) -> bool:
    return func._can_decompose()  # pyright: ignore[reportPrivateUsage]


def _is_random(func: OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether the result depends on a generator; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    schema = func._schema.arguments  # pyright: ignore[reportPrivateUsage]
    for i, a in enumerate(schema):
        if a.name == "dropout_p":
            return bool(args[i] if i < len(args) else kwargs.get(a.name, a.default_value))
    return True


@cache
def _returns_tensors(func: OpOverload) -> bool:
    returns = func._schema.returns  # pyright: ignore[reportPrivateUsage]
    return any("Tensor" in str(r.type) for r in returns) or any(
        a.alias_info is not None and a.alias_info.is_write
        for a in func._schema.arguments  # pyright: ignore[reportPrivateUsage]
    )


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that a call writes to, by its schema."""
    found: list[torch.Tensor] = []
    for i, a in enumerate(func._schema.arguments):  # pyright: ignore[reportPrivateUsage]
        if a.alias_info is not None and a.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(a.name)
            found.extend(t for t in as_tuple(given) if t is not None)
    return found


@cache
def functional_variant(name: str) -> OpOverload | None:
    """The overload that computes what `name` writes, or None."""
    namespace, op, overload = name.split(".")
    names = list(_RENAMED.get(name, ()))
    bases = [op]
    if op.endswith("_") and not op.endswith("__"):
        bases.insert(0, op[:-1])
    if op.startswith("__i") and op.endswith("__"):
        bases.insert(0, f"__{op[3:]}")
    for base in bases:
        names += [f"{namespace}.{base}.{o}" for o in (overload, overload.removesuffix("_out"))]
        names.append(f"{namespace}.{base}.default")
        packet = getattr(getattr(torch.ops, namespace), base, None)
        names += [f"{namespace}.{base}.{o or 'default'}" for o in _overloads(packet)]
    names.append(f"{namespace}.{op}_functional.default")
    func = find_overload(name)
    for candidate in names:
        try:
            found = find_overload(candidate)
        except ShoestringError:
            continue
        if _computes_the_same(func, found):
            return found
    return None


def _overloads(packet: Any) -> list[str]:
    return list(packet.overloads()) if hasattr(packet, "overloads") else []


def _computes_the_same(func: OpOverload, pure: OpOverload) -> bool:
    """Whether `pure` writes nothing and takes the inputs of `func` in their order."""
    wanted = func._schema.arguments  # pyright: ignore[reportPrivateUsage]
    taken = pure._schema.arguments  # pyright: ignore[reportPrivateUsage]
    if any(a.alias_info is not None and a.alias_info.is_write for a in taken):
        return False
    given = [str(a.type) for a in wanted if not a.kwarg_only]
    needed = [str(a.type) for a in taken if not a.kwarg_only]
    return given[: len(needed)] == needed and any(
        t in _TENSORS for t in given[: len(needed)] or given
    )


_TENSORS = ("Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]")


_RENAMED = {
    "aten._index_put_impl_.default": ("aten.index_put.default",),
    "aten.zero_.default": ("aten.zeros_like.default",),
}


def _without_outputs(
    func: OpOverload, pure: OpOverload, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments without `out=` tensors and what the functional variant lacks."""
    known = {a.name for a in pure._schema.arguments}  # pyright: ignore[reportPrivateUsage]
    outs = {
        a.name
        for a in func._schema.arguments  # pyright: ignore[reportPrivateUsage]
        if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write
    }
    count = len([a for a in pure._schema.arguments if not a.kwarg_only])
    return tuple(args[:count]), {k: v for k, v in kwargs.items() if k not in outs and k in known}


def _pieces(
    name: str, func: OpOverload, args: Any, kwargs: Any, outcome: Sequence[torch.Tensor]
) -> list[tuple[str, dict[str, Any]]]:
    """split, unbind: one slice or select a piece."""
    schema = func._schema.arguments  # pyright: ignore[reportPrivateUsage]
    given = {
        a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
        for i, a in enumerate(schema)
    }
    rank = args[0].dim()
    dim = int(given["dim"]) % rank
    if name == "aten.unbind.int":
        return [("aten.select.int", {"dim": dim, "index": i}) for i in range(len(outcome))]
    pieces: list[tuple[str, dict[str, Any]]] = []
    start = 0
    for t in outcome:
        end = start + int(t.shape[dim])
        pieces.append(("aten.slice.Tensor", {"dim": dim, "start": start, "end": end, "step": 1}))
        start = end
    return pieces


def trace(fn: Callable[..., Any], types: Sequence[TensorType], name: str = "traced") -> Function:
    """`fn`, called with one tensor a type, as a function with outputs `out0`, `out1`, ...

    Raises:
        CaptureError: SS1xxx where `fn` reads values or uses what has no rule.
    """
    tracer = Tracer(name)
    inputs = [tracer.input(t, Role.BATCH, f"in{i}") for i, t in enumerate(types)]
    with torch.no_grad(), tracer:
        outcome = fn(*inputs)
    tensors = [t for t in as_tuple(outcome) if t is not None]
    return tracer.finish([(f"out{i}", t) for i, t in enumerate(tensors)])
