# ruff: noqa: E501, UP031
# Tables of code: one line each reads best, and braces are taken by the templates.
"""What a statement of a random program can be.

Each production looks at the values in scope and writes a statement, or None where it finds no
operands. It need not be right: the generator runs each statement, and drops what PyTorch refuses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .program import Stmt

Production = Callable[["Scope"], "Stmt | None"]


@dataclass
class Scope:
    """The values at one point of a program, and a source of choices."""

    rng: random.Random
    values: Mapping[str, torch.Tensor]
    count: int
    special: bool = False

    # -- choosing operands ---------------------------------------------------------------------

    def pick(self, accept: Callable[[torch.Tensor], bool]) -> str | None:
        """A value; later ones are likelier, so that programs grow deep."""
        found = [n for n, t in self.values.items() if accept(t)]
        if not found:
            return None
        at = max(self.rng.random(), self.rng.random() if self.rng.random() < 0.6 else 0.0)
        return found[min(int(at * len(found)), len(found) - 1)]

    def real(self, low: int = 0, high: int = 9) -> str | None:
        return self.pick(lambda t: t.is_floating_point() and low <= t.dim() <= high)

    def integer(self, low: int = 0) -> str | None:
        return self.pick(lambda t: _is_integer(t) and t.dim() >= low)

    def boolean(self) -> str | None:
        return self.pick(lambda t: t.dtype is torch.bool)

    def matching(self, name: str, same_dtype: bool = False) -> str | None:
        """A float value that broadcasts with `name`."""
        shape, dtype = self.values[name].shape, self.values[name].dtype

        def fits(t: torch.Tensor) -> bool:
            return (
                t.is_floating_point()
                and (t.dtype is dtype or not same_dtype)
                and broadcasts(t.shape, shape)
            )

        return self.pick(fits)

    def shaped(self, dtype: torch.dtype, *shape: int) -> str | None:
        return self.pick(lambda t: t.dtype is dtype and tuple(t.shape) == shape)

    def indices_below(self, limit: int) -> str | None:
        return self.pick(lambda t: _is_integer(t) and t.dim() == 1 and _within(t, limit))

    def scratch(self) -> str | None:
        """A float value that may be written to in place: no leaf with a gradient."""
        return self.pick(lambda t: t.is_floating_point() and not (t.is_leaf and t.requires_grad))

    # -- choosing options ----------------------------------------------------------------------

    def dim(self, name: str) -> int:
        rank = max(self.values[name].dim(), 1)
        return self.rng.randrange(-rank, rank)

    def dims(self, name: str) -> tuple[int, ...]:
        rank = self.values[name].dim()
        found = self.rng.sample(range(rank), self.rng.randint(0, rank)) if rank else []
        return tuple(d - rank if self.rng.random() < 0.3 else d for d in found)

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def one(self, *options: str) -> str:
        return self.rng.choice(options)

    # -- writing -------------------------------------------------------------------------------

    def new(self, code: str, *args: str | None, outputs: int = 1, **more: bool) -> Stmt | None:
        """`v7 = code`, where every operand was found."""
        given = tuple(a for a in args if a is not None)
        if len(given) != len(args):
            return None
        targets = tuple(f"v{self.count + i}" for i in range(outputs))
        return Stmt(targets, code, given, **more)

    def effect(self, code: str, *args: str | None, **more: bool) -> Stmt | None:
        return self.new(code, *args, outputs=0, **more)


def broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    pairs = zip(reversed(a), reversed(b), strict=False)
    return all(m == n or m == 1 or n == 1 for m, n in pairs)


def _is_integer(t: torch.Tensor) -> bool:
    return not t.is_floating_point() and t.dtype is not torch.bool and not t.is_complex()


def _within(t: torch.Tensor, limit: int) -> bool:
    return bool(((t >= 0) & (t < limit)).all())


# -- pointwise -----------------------------------------------------------------------------------

# At infinity PyTorch's gelu is NaN or infinity: its vector code and its scalar code differ.
UNARY = (
    "torch.sin({0})", "torch.cos({0})", "torch.tanh({0})", "torch.sigmoid({0})",
    "torch.exp({0}.clamp(max=2))", "torch.exp(-{0} * {0})", "torch.expm1({0}.clamp(max=1.5))",
    "F.gelu({0}.clamp(max=9))", "F.gelu({0}, approximate='tanh')", "F.silu({0})", "F.softplus({0})",
    "F.mish({0})", "torch.erf({0})", "torch.atan({0})", "torch.log({0}.abs() + 0.5)",
    "torch.log1p({0}.abs())", "torch.log2({0}.abs() + 1)", "torch.sqrt({0} * {0} + 0.25)",
    "torch.rsqrt({0} * {0} + 0.5)", "torch.reciprocal({0}.abs() + 0.5)", "-{0}", "{0}.square()",
    "{0} ** 2", "{0} ** 3", "({0}.abs() + 0.5) ** 0.5", "({0}.abs() + 0.5) ** -1.5",
    "2.0 ** {0}.clamp(max=2)", "F.logsigmoid({0})", "F.elu({0})", "F.selu({0})", "F.softsign({0})",
    "F.hardswish({0})", "F.hardsigmoid({0})", "F.hardtanh({0})", "F.relu6({0})", "F.relu({0})",
    "F.leaky_relu({0}, 0.1)", "{0}.abs()", "{0}.clamp(-0.7, 0.6)", "{0}.clamp(min=-0.2)",
    "torch.nan_to_num({0})", "{0} * 1", "{0} + 0", "{0} - 0", "{0} / 1", "{0} * 2", "{0} / 4",
    "{0} / 3", "3 - {0}", "0 - {0}", "1.5 * {0}", "2 / ({0}.abs() + 1)", "-(-{0})", "{0} + (-{0}).exp()",
    "{0}.sign()", "torch.round({0} * 4) / 4", "torch.floor({0} * 3)", "torch.trunc({0} * 3)",
    "torch.celu({0}, 0.7)", "F.threshold({0}, 0.1, -0.5)", "torch.asinh({0})", "torch.sinc({0})",
    "{0}.clone()", "{0}.contiguous()", "{0}.clone().unsqueeze_(0)", "{0}.clone().squeeze_()", "torch.frac({0})", "torch.logit({0}.sigmoid())",
)  # fmt: skip
BINARY = (
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "{0} / ({1}.abs() + 0.5)", "{1} - {0}",
    "torch.add({0}, {1}, alpha=-0.5)", "torch.sub({0}, {1}, alpha=2)", "torch.maximum({0}, {1})",
    "torch.minimum({0}, {1})", "torch.atan2({0}, {1}.abs() + 0.5)", "({0}.abs() + 0.5) ** {1}",
    "torch.logaddexp({0}, {1})", "torch.rsub({0}, {1})", "torch.lerp({0}, {1}, 0.3)",
    "torch.where({0} > {1}, {0}, {1} * 0.5)", "torch.where({0} < 0.3, {0}, {1})", "{0} * ({1} > 0)",
    "torch.hypot({0}, {1}.abs() + 0.5)", "torch.xlogy({0}, {1}.abs() + 0.5)",
    "torch.clamp({0}, max={1})", "torch.addcmul({0}, {1}, {1}, value=0.3)",
    "torch.addcdiv({0}, {1}, {1} * {1} + 0.5, value=-0.5)", "F.mse_loss({0}, {1}, reduction='none')",
    "torch.fmax({0}, {1})", "torch.fmin({0}, {1})", "torch.copysign({0}, {1})",
    "F.huber_loss({0}, {1}, reduction='none', delta=0.4)", "{0} + {1} * 0", "-{0} * -{1}",
)  # fmt: skip
INTEGER = (
    "{0} + 1", "{0} * 3 - 2", "{0} // 2", "-{0} // 2", "{0} % 3", "-{0} % 3",
    "torch.div(-{0}, 2, rounding_mode='trunc')", "{0} / 2", "{0}.abs()", "{0}.clamp(0, 2)",
    "{0} ** 2", "{0} & 3", "{0} | 4", "{0} ^ 1", "~{0}", "{0} << 1", "{0} >> 1", "{0} * 0.5",
    "{0}.float().sin()", "{0}.sum()", "{0}.cumsum(-1)", "{0}.to(torch.uint8)", "{0}.amax()",
    "torch.fmod(-{0}, 3)", "{0}.prod()", "{0}.float().mean()", "torch.where({0} > 1, {0}, -{0})",
)  # fmt: skip
BOOLEAN = (
    "~{0}", "{0} & {1}", "{0} | {1}", "{0} ^ {1}", "torch.logical_and({0}, {1})", "{0}.any()",
    "{0}.all()", "{0}.any(-1)", "{0}.all(-1, keepdim=True)", "{0}.sum()", "{0}.sum(-1)", "{0} * 0.5",
    "{0}.float()", "{0} == {1}", "{0} + {1}", "torch.where({0}, 1.0, -0.5)", "{0}.long() + 1",
    "{0} * {1}", "{0}.cumsum(-1)", "{0}.float().mean(-1)",
)  # fmt: skip
COMPARISON = (
    "{0} > {1}", "{0} <= {1}", "{0} == {1}", "{0} != {1}", "{0} >= 0.1", "{0} < -0.2",
    "torch.logical_or({0} > 0.3, {1} > 0.3)", "torch.isfinite({0})", "torch.isnan({0})",
    "torch.logical_not({0} > 0)", "torch.signbit({0} + 0.01)", "torch.isclose({0}, {1})",
)  # fmt: skip


def unary(s: Scope) -> Stmt | None:
    return s.new(s.one(*UNARY), s.real())


def binary(s: Scope) -> Stmt | None:
    x = s.real()
    return s.new(s.one(*BINARY), x, s.matching(x)) if x else None


def integer(s: Scope) -> Stmt | None:
    return s.new(s.one(*INTEGER), s.integer())


def mixed(s: Scope) -> Stmt | None:
    """Type promotion: floats with integers and bools."""
    x = s.real()
    if x is None:
        return None
    shape = s.values[x].shape
    y = s.pick(lambda t: not t.is_floating_point() and broadcasts(t.shape, shape))
    return s.new(s.one("{0} * {1}", "{0} + {1}", "{1} - {0}", "{1} * 0.5 + {0}"), x, y)


def boolean(s: Scope) -> Stmt | None:
    x = s.boolean()
    if x is None:
        return None
    shape = s.values[x].shape
    y = s.pick(lambda t: t.dtype is torch.bool and broadcasts(t.shape, shape))
    return s.new(s.one(*BOOLEAN), x, y)


def comparison(s: Scope) -> Stmt | None:
    x = s.real()
    return s.new(s.one(*COMPARISON), x, s.matching(x)) if x else None


def where(s: Scope) -> Stmt | None:
    x = s.real()
    if x is None:
        return None
    shape = s.values[x].shape
    c = s.pick(lambda t: t.dtype is torch.bool and broadcasts(t.shape, shape))
    code = s.one(
        "torch.where({0}, {1}, {2})", "{1}.masked_fill({0}, 0.25)", "torch.where({0}, {1}, 0.5)",
        "torch.where({0}, -1, {1})", "{1} * {0}",
    )  # fmt: skip
    return s.new(code, c, x, s.matching(x, same_dtype=True))


def cast(s: Scope) -> Stmt | None:
    x = s.pick(lambda t: True)
    to = s.one(
        "float()",
        "double()",
        "half()",
        "bfloat16()",
        "to(torch.float32)",
        "long()",
        "bool()",
        "int()",
    )
    return s.new(f"{{0}}.{to}", x)


def composed(s: Scope) -> Stmt | None:
    x = s.real()
    if x is None:
        return None
    code = s.one(
        "torch.addcmul({0}, {1}, {2})", "torch.lerp({0}, {1}, torch.sigmoid({2}))",
        "{0} * {1} + {2}", "torch.where({0} > 0, {1}, {2})", "torch.addcdiv({0}, {1}, {2}.abs() + 1)",
        "torch.clamp({0}, {1}, {2})", "torch.stack([{0} + {1}, {1} + {0}]).sum(0) + {2}",
    )  # fmt: skip
    return s.new(code, x, s.matching(x, same_dtype=True), s.matching(x, same_dtype=True))


# -- views ---------------------------------------------------------------------------------------


def _view_codes(s: Scope, x: str) -> list[str]:
    t = s.values[x]
    rank, d = t.dim(), s.dim(x)
    codes = ["{0}.unsqueeze(%d)" % s.rng.randint(-rank - 1, rank), "{0}.squeeze()", "{0}.view(-1)",
             "{0}.reshape(-1)", "{0}.detach()", "{0}.flatten()", "{0}.view_as({0})",
             "{0}.expand(2, %s)" % ", ".join(["-1"] * rank) if rank else "{0}.expand(3)"]  # fmt: skip
    if rank == 0:
        return codes
    n = t.shape[d]
    order = s.rng.sample(range(rank), rank)
    start = s.rng.randint(0, max(n - 1, 0))
    codes += [
        f"{{0}}.permute({order})", f"{{0}}.transpose(0, {d})", f"{{0}}.squeeze({d})",
        f"{{0}}.movedim(0, {d})", f"{{0}}.narrow({d}, {start}, {n - start})", "{0}[..., ::2]",
        "{0}[1:]", "{0}[:-1]", "{0}[None, ..., 0]", "{0}[::2, None]", f"{{0}}.unfold({d}, 2, 1)",
        "{0}.unflatten(0, (1, -1))", "{0}.flatten(-2)" if rank > 1 else "{0}[-1:]",
    ]  # fmt: skip
    if n:
        codes.append(f"{{0}}.select({d}, {s.rng.randint(-n, n - 1)})")
    if rank > 1:
        codes += [
            f"{{0}}.diagonal({s.rng.randint(-1, 1)}, 0, {order[0] or 1})", "{0}.mT", "{0}[1:, ::2]",
            "{0}.transpose(-1, -2)", "{0}.view(%s, -1)" % t.shape[-1],
            "{0}.reshape(%s)" % ", ".join(map(str, reversed(t.shape))),
        ]  # fmt: skip
    if t.numel() >= 4 and t.is_contiguous() and t.storage_offset() == 0:
        codes += [
            "{0}.as_strided((2, 2), (1, 2))",
            "{0}.as_strided((2, 2), (2, 1), %d)" % (t.numel() - 4),
        ]
    codes += ["{0}.expand(%s)" % ", ".join(str(3 if k == 1 else -1) for k in t.shape)]
    return codes


def view(s: Scope) -> Stmt | None:
    x = s.pick(lambda t: s.rng.random() < 0.9 or t.is_floating_point())
    return s.new(s.rng.choice(_view_codes(s, x)), x) if x else None


def split(s: Scope) -> Stmt | None:
    x = s.pick(lambda t: t.dim() > 0 and t.shape[0] >= 2)
    if x is None:
        return None
    n = s.values[x].shape[0]
    code = s.one(
        "{0}.chunk(2)", f"{{0}}.split([1, {n - 1}])", "{0}.tensor_split(2)", "torch.hsplit({0}, 2)"
    )
    if n <= 3 and s.flag():
        return s.new("{0}.unbind(0)", x, outputs=n)
    return s.new(code, x, outputs=2)


def bits(s: Scope) -> Stmt | None:
    """The bytes of a value that is no result of arithmetic, as other numbers."""
    x = s.pick(lambda t: t.dtype is torch.int32 or (t.dtype is torch.float32 and t.is_leaf))
    return s.new(s.one("{0}.detach().view(torch.int32) >> 20", "{0}.detach().view(torch.uint8)"), x)


# -- writing in place ----------------------------------------------------------------------------

INPLACE = (
    "{0}.mul_(0.5)", "{0}.add_(0.25)", "{0}.neg_()", "{0}.tanh_()", "{0}.relu_()", "{0}.clamp_(-0.5, 0.5)",
    "{0}.zero_()", "{0}.fill_(0.5)", "{0}.sigmoid_()", "{0}.abs_()", "{0}.sin_()", "{0}.div_(2)",
    "F.relu({0}, inplace=True)", "{0}.view(-1)[:1].add_(1)", "{0}.pow_(2)",
)  # fmt: skip
INPLACE_BINARY = (
    "{0}.add_({1})", "{0}.mul_({1})", "{0}.sub_({1}, alpha=0.5)", "{0}.copy_({1})",
    "{0}.addcmul_({1}, {1}, value=0.5)", "{0}.lerp_({1}, 0.25)", "{0}.div_({1}.abs() + 1)",
    "{0}.masked_fill_({1} > 0.2, 0.125)", "{0}.copy_({0} + {1})",
)  # fmt: skip
SLICES = ("[1:]", "[:1]", "[..., 0]", "[..., ::2]", "[0]", "[..., -1:]", "[1::2]", ".T", "[None]",
          "[..., 1:]", ".view(-1)[1:]", ".transpose(0, -1)", ".diagonal()", "[:, 0]")  # fmt: skip


def in_place(s: Scope) -> Stmt | None:
    return s.effect(s.one(*INPLACE), s.scratch(), no_grad=s.rng.random() < 0.08)


def in_place_binary(s: Scope) -> Stmt | None:
    x = s.scratch()
    return s.effect(s.one(*INPLACE_BINARY), x, s.matching(x)) if x else None


def in_place_part(s: Scope) -> Stmt | None:
    x = s.pick(
        lambda t: t.is_floating_point() and t.dim() > 0 and not (t.is_leaf and t.requires_grad)
    )
    if x is None:
        return None
    part = s.one(*SLICES)
    code = s.one(f"{{0}}{part}.mul_(0.5)", f"{{0}}{part}.add_({{1}}.mean() if {{1}}.numel() else 0)",
                 f"{{0}}{part}.copy_({{0}}{part} + 0.5)", f"{{0}}{part}.fill_(-0.5)",
                 f"{{0}}{part}.neg_().add_(0.1)", f"{{0}}{part}.tanh_()")  # fmt: skip
    return s.effect(code, x, s.real())


def in_place_indexed(s: Scope) -> Stmt | None:
    x = s.pick(
        lambda t: t.is_floating_point() and t.dim() > 0 and not (t.is_leaf and t.requires_grad)
    )
    if x is None:
        return None
    i = s.indices_below(s.values[x].shape[0])
    code = s.one(
        "{0}.index_fill_(0, {1}.long(), 0.5)", "{0}[{1}.long()] = 0.25", "{0}[{1}.long()] *= 0.5",
        "{0}.index_add_(0, {1}.long(), {0}[{1}.long()].detach() * 0.5)",
        "{0}.index_copy_(0, {1}.long()[:1], {0}[{1}.long()[:1]].detach() + 1)",
    )  # fmt: skip
    return s.effect(code, x, i)


def buffer_update(s: Scope) -> Stmt | None:
    """Running statistics, counters: state that the forward pass writes."""
    b = s.pick(lambda t: getattr(t, "is_fuzz_buffer", False))
    if b is None:
        return None
    if not s.values[b].is_floating_point():
        return s.effect(s.one("{0}.add_(1)", "{0}.mul_(2).sub_(1)", "{0}[..., :1].add_(3)"), b)
    code = s.one(
        "{0}.mul_(0.9).add_({1}.detach().float().sum() * 0.1)", "{0}.copy_({0} * 0.5 + 0.1)",
        "{0}[..., :1].add_({1}.detach().sum())", "{0}.lerp_({1}.detach().sum().to({0}.dtype), 0.1)",
        "{0}.copy_({0}.flip(0) * 0.9)",
    )  # fmt: skip
    return s.effect(code, b, s.real())


# -- reductions and scans ------------------------------------------------------------------------

REDUCTIONS = ("sum", "mean", "amax", "amin", "logsumexp", "var", "std", "sum", "mean")


def reduction(s: Scope) -> Stmt | None:
    x = s.real()
    if x is None:
        return None
    dims, keep = s.dims(x), s.flag()
    name = s.one(*REDUCTIONS)
    if name in ("var", "std"):
        # Where all elements agree, the derivative of std is infinite.
        inner = "({0} + torch.linspace(-1, 1, max({0}.shape[-1:] or [1])).to({0}.dtype))"
        return s.new(
            f"{inner}.{name}({dims or None}, correction={s.one('0', '1')}, keepdim={keep})", x
        )
    return s.new(f"{{0}}.{name}({dims}, keepdim={keep})", x)


def scan(s: Scope) -> Stmt | None:
    x = s.real(1)
    if x is None:
        return None
    d = s.dim(x)
    code = s.one(
        f"{{0}}.cumsum({d})", f"F.softmax({{0}}, {d})", f"F.log_softmax({{0}}, {d})", f"F.softmin({{0}}, {d})",
        f"({{0}} * 0.5 + 1).cumprod({d})", f"{{0}}.logcumsumexp({d})", f"{{0}}.max({d}).values",
        f"{{0}}.min({d}, keepdim=True).values", f"{{0}}.argmax({d})", f"{{0}}.argmin({d}, keepdim=True)",
        f"{{0}}.sort({d}).values", f"{{0}}.argsort({d}, stable=True)", f"{{0}}.topk(1, {d}).values",
        f"{{0}}.cummax({d}).values", f"torch.linalg.vector_norm({{0}} + 0.1, 2, {d})",
        f"({{0}} + 1.5).prod({d})", f"{{0}}.sort({d}, descending=True).values", "{0}.max()", "{0}.sum()",
        f"F.softmax({{0}}, {d}, dtype=torch.float32)", f"F.normalize({{0}} + 2, dim={d})",
        f"{{0}}.norm(dim={d}) + 1", f"F.glu({{0}}, {d})", f"{{0}}.sum({d}, dtype=torch.float64)",
        "torch.trapezoid({0})", f"{{0}}.diff(dim={d})", f"{{0}}.median({d}).values", f"{{0}}.kthvalue(1, {d}).values",
        f"{{0}}.nansum({d})", f"({{0}} > 0).any({d})", f"{{0}}.count_nonzero({d})", f"{{0}}.aminmax(dim={d}).max",
        f"{{0}}.topk(2, {d}, largest=False).indices", "{0}.mean()", "{0}.cov()",
    )  # fmt: skip
    return s.new(code, x)


def norm(s: Scope) -> Stmt | None:
    x = s.real(1)
    if x is None:
        return None
    t = s.values[x]
    w = s.pick(lambda p: p.dtype is t.dtype and p.dim() == 1 and p.shape == t.shape[-1:])
    eps = s.one("1e-2", "1e-1")
    shape = tuple(t.shape[s.rng.randrange(t.dim()) :])
    codes = [f"F.layer_norm({{0}}, {tuple(t.shape[-1:])}, {{1}}, {{1}}, {eps})",
             f"F.layer_norm({{0}}, {shape}, eps={eps})", f"F.rms_norm({{0}}, {tuple(t.shape[-1:])}, eps={eps})",
             f"F.layer_norm({{0}}, {tuple(t.shape[-1:])}, None, {{1}}, {eps})"]  # fmt: skip
    return s.new(s.rng.choice(codes), x, w or x)


def channel_norm(s: Scope) -> Stmt | None:
    x = s.real(2)
    if x is None:
        return None
    t = s.values[x]
    channels = t.shape[1]

    def stats(p: torch.Tensor) -> bool:
        return p.dtype is t.dtype and tuple(p.shape) == (channels,)

    eps = s.one("1e-2", "1e-1")
    mean = s.pick(lambda p: stats(p) and getattr(p, "is_fuzz_buffer", False))
    if mean is None or s.rng.random() < 0.3:
        groups = s.rng.choice([g for g in (1, 2, 3) if channels % g == 0])
        return s.new(f"F.group_norm({{0}}, {groups}, {{1}}, {{1}}, {eps})", x, s.pick(stats))
    training, momentum = s.rng.random() < 0.7, s.one("0.1", "0.5")
    code = f"F.batch_norm({{0}}, {{1}}, {{2}}.abs_().add_(0.1), {{3}}, {{3}}, {training}, {momentum}, {eps})"
    var = s.pick(lambda p: stats(p) and getattr(p, "is_fuzz_buffer", False))
    if var == mean:
        code = code.replace("{2}.abs_().add_(0.1)", "torch.ones_like({2})")
    # A weight that is a running statistic too would be read while the kernel writes it.
    weight = s.pick(lambda p: stats(p) and not getattr(p, "is_fuzz_buffer", False))
    if weight is not None and not s.values[weight].is_contiguous():
        # PyTorch's backward kernels for two dimensions read a strided weight as if it had no gaps.
        code = code.replace("{3}", "{3}.contiguous()")
    return s.new(code, x, mean, var, weight)


# -- contractions --------------------------------------------------------------------------------


def matmul(s: Scope) -> Stmt | None:
    x = s.real(1)
    if x is None:
        return None
    t = s.values[x]
    k = t.shape[-1]
    y = s.pick(lambda p: p.dtype is t.dtype and p.dim() >= 1 and p.shape[max(-2, -p.dim())] == k)
    if y is None or s.rng.random() < 0.2:
        y = s.pick(lambda p: p.dtype is t.dtype and p.dim() == 2 and p.shape[1] == k)
        return s.new(s.one("F.linear({0}, {1})", "{0} @ {1}.t()", "{0} @ {1}.mT"), x, y)
    codes = ["{0} @ {1}", "torch.matmul({0}, {1})", "torch.tensordot({0}, {1}, 1)"]
    pair = (t.dim(), s.values[y].dim())
    codes += {
        (2, 2): ["torch.mm({0}, {1})", "torch.einsum('ij,jk->ki', {0}, {1})",
                 "torch.addmm(({0} @ {1}).mean(0), {0}, {1}, beta=0.5, alpha=-1.5)",
                 "torch.einsum('ij,jk->i', {0}, {1})"],
        (3, 3): ["torch.bmm({0}, {1})", "torch.einsum('bij,bjk->bik', {0}, {1})",
                 "torch.baddbmm(torch.bmm({0}, {1}) * 0.5, {0}, {1}, alpha=0.5)"],
        (2, 1): ["torch.mv({0}, {1})", "torch.einsum('ij,j->i', {0}, {1})"],
        (1, 1): ["torch.dot({0}, {1})", "torch.outer({0}, {1})", "torch.vdot({0}, {1})"],
    }.get(pair, [])  # fmt: skip
    return s.new(s.rng.choice(codes), x, y)


def self_product(s: Scope) -> Stmt | None:
    x = s.real(2, 3)
    code = s.one("{0} @ {0}.mT", "{0}.mT @ {0}", "torch.einsum('...ij,...kj->...ik', {0}, {0})",
                 "torch.cdist({0}, {0} + 1)", "torch.kron({0}, {0}[:1])", "torch.tril({0} @ {0}.mT)",
                 "F.scaled_dot_product_attention({0}, {0}, {0})",
                 "F.scaled_dot_product_attention({0}, {0} * 0.5, {0}, is_causal=True)")  # fmt: skip
    return s.new(code, x)


def linear(s: Scope) -> Stmt | None:
    """A layer with weights as the program has them, cast to fit."""
    x, w = s.real(1), s.pick(lambda t: t.is_floating_point() and t.dim() == 2)
    if x is None or w is None:
        return None
    k, n = s.values[w].shape[1], s.values[w].shape[0]
    code = "F.linear({0}, {1}.to({0}.dtype), {2}.to({0}.dtype))"
    if s.values[x].shape[-1] == k:
        return s.new(code, x, w, s.pick(lambda t: t.is_floating_point() and tuple(t.shape) == (n,)))
    return s.new("{0}.flatten()[:1] * {1}", x, w)


def convolution(s: Scope) -> Stmt | None:
    x, w = s.real(3, 4), None
    if x is not None:
        t = s.values[x]
        w = s.pick(lambda p: p.is_floating_point() and p.dim() == t.dim())
    padding, stride = s.rng.randint(0, 2), s.rng.randint(1, 2)
    if x is None or w is None:
        return None
    rank = s.values[x].dim() - 2
    inner = s.values[w].shape[1]
    resized = f"{{0}}.repeat_interleave({inner}, 1)[:, :{inner}]" if inner else "{0}"
    codes = [
        f"F.conv{rank}d({resized}, {{1}}.to({{0}}.dtype), padding={padding}, stride={stride})",
        f"F.conv{rank}d({resized}, {{1}}.to({{0}}.dtype), padding=2, dilation=2)",
        f"F.conv{rank}d({{0}}.repeat_interleave(2, 1)[:, :2], {{1}}[:2, :1].to({{0}}.dtype), padding=2, groups=2)",
        f"F.conv_transpose{rank}d({{0}}[:, :1], {{1}}[:1].to({{0}}.dtype), stride={stride})",
    ]
    return s.new(s.rng.choice(codes), x, w)


def pool(s: Scope) -> Stmt | None:
    x = s.real(3, 4)
    if x is None:
        return None
    rank = s.values[x].dim() - 2
    mode = "nearest" if s.flag() else ("linear" if rank == 1 else "bilinear")
    codes = [f"F.max_pool{rank}d({{0}}, 2, 1)", f"F.avg_pool{rank}d({{0}}, 2, 1, 1)",
             f"F.adaptive_avg_pool{rank}d({{0}}, 1)", f"F.avg_pool{rank}d({{0}}, 2)",
             f"F.interpolate({{0}}, scale_factor=2, mode='{mode}')",
             f"F.max_pool{rank}d({{0}}, 2, 2, 1)"]  # fmt: skip
    return s.new(s.rng.choice(codes), x)


# -- indexing and moving -------------------------------------------------------------------------


def indexing(s: Scope) -> Stmt | None:
    x = s.real(1)
    if x is None:
        return None
    i = s.indices_below(s.values[x].shape[0])
    codes = [
        "{0}[{1}.long()]", "{0}.index_select(0, {1}.long())", "F.embedding({1}.long(), {0})",
        "F.embedding({1}.long(), {0}, padding_idx=0)", "F.embedding({1}.long(), {0}, padding_idx=-1)",
        "{0}.index_add(0, {1}.long(), {0}[{1}.long()] * 0.5)", "torch.take_along_dim({0}.flatten(), {1}.long(), 0)",
        "{0}.index_put(({1}.long(),), {0}[{1}.long()] * 0.5, accumulate=True)",
        "torch.zeros_like({0}).index_add(0, {1}.long(), {0}[{1}.long()])",
        "{0}.index_fill(0, {1}.long(), 0.5)", "{0}[{1}.long(), ..., None]",
        "F.one_hot({1}.long(), 9).to({0}.dtype)[:, :{0}.shape[0]] @ {0}",
        "{0}.scatter_add(0, {1}.long().view(-1, *[1] * ({0}.dim() - 1)).expand(-1, *{0}.shape[1:]), "
        "{0}[{1}.long()])",
        "{0}.gather(0, {1}.long().view(-1, *[1] * ({0}.dim() - 1)).expand(-1, *{0}.shape[1:]))",
        "{0}.scatter(0, {1}.long()[:1].view(-1, *[1] * ({0}.dim() - 1)).expand(-1, *{0}.shape[1:]), 0.5)",
    ]  # fmt: skip
    return s.new(s.rng.choice(codes), x, i)


def last_dim_indexing(s: Scope) -> Stmt | None:
    x = s.real(2)
    if x is None:
        return None
    i = s.indices_below(s.values[x].shape[-1])
    codes = ["{0}[..., {1}.long()]", "{0}.index_select(-1, {1}.long())", "{0}[:, {1}.long()]",
             "{0}[{1}.long() % {0}.shape[0], {1}.long() % {0}.shape[1]]"]  # fmt: skip
    return s.new(s.rng.choice(codes), x, i)


def classification(s: Scope) -> Stmt | None:
    x = s.real(2, 2)
    if x is None:
        return None
    rows, classes = s.values[x].shape
    y = s.pick(lambda t: _is_integer(t) and tuple(t.shape) == (rows,) and _within(t, classes))
    codes = ["F.cross_entropy({0}, {1}.long())", "F.cross_entropy({0}, {1}.long(), label_smoothing=0.2)",
             "F.cross_entropy({0}, {1}.long(), reduction='sum', ignore_index=1)",
             "F.nll_loss(F.log_softmax({0}, 1), {1}.long(), reduction='none')",
             "F.cross_entropy({0}, {1}.long(), reduction='none')", "F.cross_entropy({0}, F.softmax({0}, 1).detach())",
             "(F.log_softmax({0}, -1).argmax(-1) == {1}).float().mean()"]  # fmt: skip
    return s.new(s.rng.choice(codes), x, y)


def head(s: Scope) -> Stmt | None:
    """The last layer of a language model and its loss, as one statement."""
    x = s.pick(lambda t: t.is_floating_point() and t.dim() == 2 and t.numel() > 0)
    if x is None:
        return None
    given = s.values[x]
    rows = given.shape[0]
    w = s.pick(lambda t: t.dtype is given.dtype and t.dim() == 2 and t.shape[1:] == given.shape[1:])
    if w is None:
        return None
    classes = s.values[w].shape[0]
    y = s.pick(lambda t: _is_integer(t) and tuple(t.shape) == (rows,) and _within(t, classes))
    target = "{2}.long()" if y else f"torch.arange({rows}) % {classes}"
    logits = s.one("F.linear({0}, {1})", "{0} @ {1}.mT", "F.linear({0}, {1}, {1}[:, 0])",
                   "torch.tanh({0} @ {1}.mT) * 2", "F.linear({0}, {1}).float()")  # fmt: skip
    how = s.one(
        "", ", reduction='sum'", ", ignore_index=1", ", label_smoothing=0.2", ", reduction='none'"
    )
    return s.new(f"F.cross_entropy({logits}, {target}{how})", x, w, y or w)


def losses(s: Scope) -> Stmt | None:
    x = s.real(1)
    y = s.pick(
        lambda t: x is not None and t.dtype is s.values[x].dtype and t.shape == s.values[x].shape
    )
    codes = ["F.mse_loss({0}, {1})", "F.l1_loss({0}, {1})", "F.smooth_l1_loss({0}, {1})",
             "F.binary_cross_entropy_with_logits({0}, torch.sigmoid({1}).detach())",
             "F.kl_div(F.log_softmax({0}, -1), F.softmax({1}, -1), reduction='batchmean')",
             "F.cosine_similarity({0} + 2, {1} + 2, dim=0)", "F.huber_loss({0}, {1}, reduction='sum')"]  # fmt: skip
    return s.new(s.rng.choice(codes), x, y)


def joining(s: Scope) -> Stmt | None:
    x = s.real()
    if x is None:
        return None
    shape, rank = s.values[x].shape, s.values[x].dim()
    y = s.pick(lambda t: t.is_floating_point() and t.shape == shape)
    d = s.dim(x)
    codes = [f"torch.stack([{{0}}, {{1}}], {d})", "torch.stack([{0}, {1}, {0}]).mean(0)"]
    if rank:
        codes += [
            f"torch.cat([{{0}}, {{1}}], {d})",
            "torch.cat([{0}[:1], {1}])",
            "torch.vstack([{0}, {1}])",
        ]
    return s.new(s.rng.choice(codes), x, y)


def moving(s: Scope) -> Stmt | None:
    x = s.pick(lambda t: t.dim() > 0)
    if x is None:
        return None
    d, rank = s.dim(x), s.values[x].dim()
    codes = [
        f"{{0}}.flip({d})", f"{{0}}.roll(1, {d})", f"{{0}}.roll(-2, {d})", "F.pad({0}, (1, 2))",
        "F.pad({0}, (1, 0), value=1)", "F.pad({0}, (-1, 1))", f"{{0}}.repeat_interleave(2, {d})",
        "{0}.repeat(%s)" % ", ".join(["2"] + ["1"] * (rank - 1)), "{0}.tile(2)", "{0}.flip(0, -1)",
        "{0}.roll(1)",
    ]  # fmt: skip
    if rank > 1:
        codes += ["{0}.tril()", "{0}.triu(1)", "{0}.rot90()", "torch.diag_embed({0})",
                  "F.pad({0}[None], (1, 1), mode='replicate')", "F.pad({0}[None], (1, 1), mode='circular')",
                  "F.pad({0}[None], (1, 0), mode='reflect')", "F.pad({0}, (0, 1, 1, 0))"]  # fmt: skip
    else:
        codes += [
            "torch.diag({0})",
            "torch.outer({0}, {0})",
            "torch.meshgrid({0}, {0}, indexing='ij')[0]",
        ]
    return s.new(s.rng.choice(codes), x)


def creation(s: Scope) -> Stmt | None:
    x = s.real(1)
    codes = [
        "torch.arange({0}.shape[-1], dtype={0}.dtype) * 0.1", "torch.zeros_like({0})", "torch.ones({0}.shape)",
        "torch.full({0}.shape, 0.5, dtype={0}.dtype)", "torch.linspace(-1, 1, {0}.shape[-1])", "torch.eye(3)",
        "torch.tensor([0.5, -0.25, 1.0])", "torch.tensor(0.75)", "torch.tensor([1, 0, 2])", "torch.tensor(3)",
        "torch.arange({0}.shape[0])", "torch.ones(2, 3).tril().bool()", "{0}.new_full((2,), 0.3)",
        "torch.tensor([True, False])", "torch.arange(6).view(2, 3) % 3", "torch.zeros(0, 3)",
    ]  # fmt: skip
    return s.new(s.rng.choice(codes), x)


# -- autograd ------------------------------------------------------------------------------------


def autograd(s: Scope) -> Stmt | None:
    x = s.real()
    if x is None:
        return None
    y = s.matching(x, same_dtype=True)
    code = s.one(
        "ScaleGradient.apply({0}, 0.5)", "StraightThrough.apply({0})", "{0}.detach()", "{0}.detach() * {1}",
        "checkpoint(lambda a, b: torch.tanh(a * b).sin() * a, {0}, {1}, use_reentrant=False)",
        "checkpoint(lambda a: F.gelu(a.clamp(max=9)) * a.sigmoid(), {0}, use_reentrant=False)",
        "checkpoint(lambda a: (a.exp().clamp(max=3)).log1p().view(-1), {0}, use_reentrant=False)",
        "({0} - {0}.detach()) + StraightThrough.apply({1})",
    )  # fmt: skip
    return s.new(code, x, y)


def pairs(s: Scope) -> Stmt | None:
    x = s.real()
    y = s.matching(x, same_dtype=True) if x else None
    if x is None or y is None or s.values[x].shape != s.values[y].shape:
        return None
    return s.new("OwnProduct.apply({0}, {1})", x, y, outputs=2)


def no_grad(s: Scope) -> Stmt | None:
    return s.new(
        s.one("{0} * 0.5", "{0}.sum()", "{0}.view(-1)", "{0}.abs().clone()"), s.real(), no_grad=True
    )


def hook(s: Scope) -> Stmt | None:
    x = s.pick(lambda t: t.requires_grad and not t.is_leaf)
    return s.effect(
        s.one(
            "{0}.register_hook(lambda g: g * 0.5)", "{0}.register_hook(lambda g: g.clamp(-1, 1))"
        ),
        x,
    )


def second_order(s: Scope) -> Stmt | None:
    x = s.pick(lambda t: t.requires_grad and t.is_floating_point())
    return s.new("torch.autograd.grad(torch.sin({0}).sum(), {0}, create_graph=True)[0]", x)


# -- randomness ----------------------------------------------------------------------------------


def randomness(s: Scope) -> Stmt | None:
    x = s.real()
    code = s.one(
        "F.dropout({0}, 0.4)", "F.dropout({0}, 0.2) + F.dropout({0}, 0.2)", "{0} + torch.rand_like({0})",
        "{0} * torch.bernoulli(torch.full({0}.shape, 0.5))", "{0} + torch.randn({0}.shape) * 0.1",
        "F.alpha_dropout({0}, 0.3)", "{0} * torch.randint(0, 3, {0}.shape)", "F.dropout({0}, 0.0)",
        "checkpoint(lambda a: F.dropout(a.sin(), 0.3) * a, {0}, use_reentrant=False)", "F.rrelu({0}, training=True)",
        "{0} + torch.empty_like({0}).uniform_(-0.1, 0.1)", "F.dropout1d({0}, 0.4)", "F.dropout({0}, 1.0)",
    )  # fmt: skip
    return s.new(code, x, random=True)


# Production -> how often, next to the others.
PRODUCTIONS: dict[Production, float] = {
    unary: 9, binary: 10, integer: 1.5, mixed: 2, boolean: 1.5, comparison: 2, where: 2.5, cast: 2,
    composed: 2, view: 8, split: 2, bits: 0.3, in_place: 2, in_place_binary: 2, in_place_part: 2.5,
    in_place_indexed: 1, buffer_update: 1.5, reduction: 4, scan: 4, norm: 2, channel_norm: 2, matmul: 5,
    self_product: 1, linear: 2, convolution: 1.5, pool: 1, indexing: 3, last_dim_indexing: 1,
    classification: 1, head: 1.5, losses: 1, joining: 2, moving: 2.5, creation: 1.5, autograd: 2, pairs: 0.7,
    no_grad: 0.7, hook: 0.4, second_order: 0.4,
}  # fmt: skip
