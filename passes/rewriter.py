"""A small pattern engine: rules that replace one op by a value or by other ops.

    x, n = value("x"), number("n")
    RULES = rules(
        (op("aten.sub.Tensor", x, zero), x),                                  # x - 0 -> x
        (op("aten.neg.default", op("aten.neg.default", x)), x),               # -(-x) -> x
    )

A pattern names its root op, so rules are found by name and a sweep is linear in the number of
ops. The sweep goes forward once: patterns look at producers only, and those are rewritten
already, so one sweep reaches the fixpoint. A rule that would change a result's element type or
shape does not fire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoestring.ir import Function, Loc, Number, Op, Operand, TensorType, Value, lookup, make_op
from shoestring.ir.errors import IRError, PassError
from shoestring.ir.inference import infer_types, same_types

from .base import PassReport
from .editing import Names, reading

REWRITES_PER_OP = 32  # a bound on rules that fire in turn at one place: longer means they cycle


@dataclass(frozen=True)
class Var:
    """Stands for any operand or attribute that `accepts`; the same twice means equal."""

    name: str
    accepts: Callable[[Any], bool]

    def __str__(self) -> str:
        return self.name


def value(name: str) -> Var:
    """A variable for a tensor."""
    return Var(name, lambda v: isinstance(v, Value))


def number(name: str, accepts: Callable[[Any], bool] = lambda n: True) -> Var:
    """A variable for a number operand or attribute."""
    return Var(name, lambda v: isinstance(v, (bool, int, float, complex)) and accepts(v))


def anything(name: str) -> Var:
    """A variable for any operand or attribute."""
    return Var(name, lambda v: True)


@dataclass(frozen=True, eq=False)
class Pattern:
    """An op by name, its operands and the attributes that matter; also a replacement's shape."""

    name: str
    operands: tuple[Term, ...]
    attrs: Mapping[str, Any]

    def __str__(self) -> str:
        parts = [str(o) for o in self.operands] + [f"{k}={v}" for k, v in self.attrs.items()]
        return f"{self.name.removeprefix('aten.')}({', '.join(parts)})"

    @property
    def vars(self) -> Iterator[str]:
        """The names of every variable in it."""
        for term in (*self.operands, *self.attrs.values()):
            if isinstance(term, Var):
                yield term.name
            elif isinstance(term, Pattern):
                yield from term.vars


Term = Var | Pattern | Value | Number | None | tuple[Value | None, ...]


def op(name: str, *operands: Term, **attrs: Any) -> Pattern:
    """A pattern, or a replacement, of one op."""
    return Pattern(name, operands, attrs)


@dataclass
class Match:
    """Where a pattern was found: the root op, and what each variable stands for."""

    root: Op
    producers: Mapping[Value, Op]
    bound: dict[str, Any] = field(default_factory=dict[str, Any])

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def type(self, name: str) -> TensorType:
        """The type of the tensor that a variable stands for."""
        found: Value = self.bound[name]
        return found.type

    @property
    def result(self) -> TensorType:
        return self.root.result.type

    def producer(self, name: str) -> Op | None:
        """The op that makes what a variable stands for."""
        return self.producers.get(self.bound[name])

    def matches(self, term: Term, operand: Any) -> bool:
        if isinstance(term, Var):
            return term.accepts(operand) and _equal(
                self.bound.setdefault(term.name, operand), operand
            )
        if isinstance(term, Pattern):
            return isinstance(operand, Value) and self.matches_op(term, self.producers.get(operand))
        return _equal(term, operand)

    def matches_op(self, pattern: Pattern, found: Op | None) -> bool:
        if found is None or found.name != pattern.name or len(found.results) != 1:
            return False
        if len(found.operands) != len(pattern.operands):
            return False
        pairs = zip(pattern.operands, found.operands, strict=True)
        return all(self.matches(t, o) for t, o in pairs) and all(
            self.matches(t, found.attr(k)) for k, t in pattern.attrs.items()
        )


def _equal(a: Any, b: Any) -> bool:
    """Identity for tensors; else equality of text, which tells 0.0 from -0.0 and 1 from True."""
    return a is b if isinstance(a, Value) or isinstance(b, Value) else repr(a) == repr(b)


Replacement = Term | Callable[[Match], Term]


@dataclass(frozen=True, eq=False)
class Rule:
    """Replaces what `pattern` matches, where `guard` agrees.

    Attributes:
        pattern: the op to find.
        replacement: a variable, an op, or a function of the match that gives one; None declines.
        guard: a condition on the match.
    """

    pattern: Pattern
    replacement: Replacement
    guard: Callable[[Match], bool] = lambda m: True

    def __post_init__(self) -> None:
        used = set(self.replacement.vars) if isinstance(self.replacement, Pattern) else set[str]()
        unbound = used - set(self.pattern.vars)
        if unbound:
            what = f"a rule may use what its pattern binds, found {', '.join(sorted(unbound))}"
            raise PassError("SS3006", what, str(self.pattern))

    def __str__(self) -> str:
        shown = "..." if callable(self.replacement) else self.replacement
        return f"{self.pattern} -> {shown}"

    def apply(self, root: Op, producers: Mapping[Value, Op]) -> Term:
        """What to put in place of the op, or None where the rule does not hold."""
        match = Match(root, producers)
        if not match.matches_op(self.pattern, root) or not self.guard(match):
            return None
        new = self.replacement(match) if callable(self.replacement) else self.replacement
        return _instantiate(new, match)


def _instantiate(term: Term, match: Match) -> Term:
    if isinstance(term, Var):
        return match[term.name]  # type: ignore[no-any-return]
    if isinstance(term, Pattern):
        operands = tuple(_instantiate(o, match) for o in term.operands)
        attrs = {k: match[v.name] if isinstance(v, Var) else v for k, v in term.attrs.items()}
        return Pattern(term.name, operands, attrs)
    return term


class RuleSet:
    """Rules by the name of their root op, tried in order. Sets add with `+`."""

    def __init__(self, *members: Rule) -> None:
        self.members = members
        self._by_name: dict[str, list[Rule]] = {}
        for rule in members:
            self._by_name.setdefault(rule.pattern.name, []).append(rule)

    def __add__(self, other: RuleSet) -> RuleSet:
        return RuleSet(*self.members, *other.members)

    def __len__(self) -> int:
        return len(self.members)

    def of(self, name: str) -> list[Rule]:
        """The rules whose root is that op."""
        return self._by_name.get(name, [])


Guard = Callable[[Match], bool]
Entry = Rule | tuple[Pattern, Replacement] | tuple[Pattern, Replacement, Guard]


def rules(*entries: Entry) -> RuleSet:
    """A set of (pattern, replacement) or (pattern, replacement, guard)."""
    return RuleSet(*map(_rule, entries))


def _rule(entry: Entry) -> Rule:
    if isinstance(entry, Rule):
        return entry
    return Rule(entry[0], entry[1]) if len(entry) == 2 else Rule(entry[0], entry[1], entry[2])


def rewrite(function: Function, ruleset: RuleSet) -> tuple[Function, PassReport]:
    """The function with every rule applied wherever it holds, and how often each fired.

    Raises:
        PassError: SS3005 where rules undo each other for ever at one op.
    """
    return _Sweep(function, ruleset).run()


class _Sweep:
    """One forward sweep over a function."""

    def __init__(self, function: Function, ruleset: RuleSet) -> None:
        self.function = function
        self.rules = ruleset
        self.names = Names(function)
        self.subst: dict[Value, Value] = {}
        self.producers: dict[Value, Op] = {}
        self.ops: list[Op] = []
        self.fired: Counter[str] = Counter()
        self.report = PassReport()

    def run(self) -> tuple[Function, PassReport]:
        for old in self.function.ops:
            self.place(reading(old, self.subst))
        self.report.matched += sum(self.fired.values())
        self.report.changed = sum(self.fired.values())
        self.report.notes += [f"{count} x {rule}" for rule, count in self.fired.most_common()]
        if not self.fired:
            return self.function, self.report
        return self.function.with_ops(self.ops, self.subst), self.report

    def place(self, current: Op) -> None:
        """Rewrites one op until no rule holds, then keeps it."""
        for _ in range(REWRITES_PER_OP):
            new = self.step(current)
            if new is None:
                self.emit(current)
                return
            if isinstance(new, Value):
                self.subst[current.result] = new
                return
            current = new
        raise PassError(
            "SS3005", f"rules for {current.name} do not come to an end", str(current.loc)
        )

    def emit(self, new: Op) -> None:
        self.ops.append(new)
        self.producers.update(dict.fromkeys(new.results, new))

    def step(self, current: Op) -> Op | Value | None:
        """What the first rule that holds makes of the op."""
        for rule in self.rules.of(current.name):
            term = rule.apply(current, self.producers)
            new = None if term is None else self.build(term, current)
            if new is not None:
                self.fired[str(rule)] += 1
                return new
        return None

    def build(self, term: Term, current: Op) -> Op | Value | None:
        """The replacement, or None with a reason where it would change the result's type."""
        if isinstance(term, Value):
            if term.type == current.result.type:
                return term
        elif isinstance(term, Pattern):
            new = self.construct(term, current.loc, current.result.name)
            if new is not None and same_types(infer_types(new), (current.result.type,)):
                return Op(new.opdef, new.operands, new.attrs, current.results, current.loc)
        self.report.matched += 1
        self.report.skip("the element type or shape would change", current.loc)
        return None

    def construct(self, term: Pattern, loc: Loc, base: str) -> Op | None:
        """The root of a replacement; the ops below it are placed. None where torch refuses it."""
        operands: list[Operand] = []
        for operand in term.operands:
            if isinstance(operand, Pattern):
                inner = self.construct(operand, loc, base)
                if inner is None:
                    return None
                made = self.names.fresh(infer_types(inner)[0], base)
                self.place(Op(inner.opdef, inner.operands, inner.attrs, (made,), loc))
                operands.append(self.subst.get(made, made))
            else:
                assert not isinstance(operand, Var), "a variable is bound before"
                operands.append(operand)
        new = make_op(term.name, tuple(operands), term.attrs, loc)
        try:
            infer_types(new)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        return new


def known(name: str) -> bool:
    """Whether an op of that name exists in this PyTorch."""
    try:
        lookup(name)
    except IRError:
        return False
    return True


__all__ = [
    "Match",
    "Pattern",
    "Rule",
    "RuleSet",
    "Var",
    "anything",
    "known",
    "number",
    "op",
    "rewrite",
    "rules",
    "value",
]
