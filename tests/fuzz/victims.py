"""Programs written by hand in which every seeded miscompile has a place."""

from __future__ import annotations

from dataclasses import replace

from .program import Input, Optimizer, Program, Stmt

_LINES = (
    ("e0", "F.embedding({0}, {1}, padding_idx=1)", "ids emb"),
    ("n0", "F.layer_norm({0}, (4,), {1}, {1}, 0.1)", "e0 bias"),
    ("l0", "{0} @ {1}.t() + {2}", "n0 weight bias"),
    ("b0", "F.batch_norm({0} + {1}, {2}, {3}, {4}, {4}, True, 0.1, 0.01)", "l0 x mean var bias"),
    ("", "{0}.add_(1)", "count"),
    ("d0", "F.dropout({0}, 0.5)", "b0"),
    ("d1", "F.dropout({0}, 0.5)", "b0"),
    ("u0", "{0} - {1}", "d0 d1"),
    ("s0", "F.softmax({0}, 1)", "u0"),
    ("w0", "{0}.clone()", "s0"),
    ("", "{0}[1:].mul_(2.0)", "w0"),
    ("k0", "{0}[:, 1:3]", "w0"),
    ("c0", "torch.cat([{0}, {1}[:, :2]], 1)", "k0 u0"),
    ("o0", "{0} @ {1}.t()", "c0 tied"),
    ("r0", "{0}.sum(1, keepdim=True) * {0}", "o0"),
    ("ce", "F.cross_entropy({0}, {1})", "r0 ids"),
    ("h0", "({0} * 1.37 + 0.21) * {0}", "pb"),
    ("h1", "({0} * 0.7).sum(1)", "ph"),
    ("i0", "torch.div(-{0}, 2, rounding_mode='floor')", "ids"),
    ("m0", "torch.maximum({0}, {1})", "odd x"),
    ("m1", "{0}.amax(1)", "odd"),
    ("z0", "{0} + 0.0", "odd"),
    ("z1", "{0} * 0.0", "odd"),
    ("g0", "{0} > 0", "odd"),
    ("q0", "torch.where({0} > 0, {0}, {1})", "x l0"),
    ("t0", "{0}.half().float()", "x"),
    ("f0", "torch.tensor(0.1, dtype=torch.float64) * {0}.double()", "x"),
    ("a0", "{0}.cumsum(1)", "x"),
    ("v0", "({0} * {1}).sum()", "x x"),
)


def _statement(target: str, code: str, args: str) -> Stmt:
    targets = (target,) if target else ()
    return Stmt(targets, code, tuple(args.split()), random="dropout" in code)


VICTIM = Program(
    inputs=(
        Input("emb", "parameter", "f32", (5, 4), seed=1),
        Input("tied", "tied:emb", "f32", (5, 4)),
        Input("weight", "parameter", "f32", (4, 4), seed=2),
        Input("bias", "parameter", "f32", (4,), "positive", seed=3),
        Input("pb", "parameter", "bf16", (6, 7), seed=4),
        Input("ph", "parameter", "f16", (5, 64), seed=5),
        Input("mean", "buffer", "f32", (4,), seed=6),
        Input("var", "buffer", "f32", (4,), "positive", seed=7),
        Input("count", "buffer", "i64", (), "zero"),
        Input("ids", "batch", "i64", (3,), "below:5", seed=17),
        Input("x", "batch", "f32", (3, 4), seed=9),
        Input("odd", "batch", "f32", (3, 4), "special", seed=10),
    ),
    body=tuple(_statement(*line) for line in _LINES),
    loss=("ce", "h0", "h1", "q0"),
    metrics=("c0", "i0", "m0", "m1", "z0", "z1", "g0", "t0", "f0", "a0", "w0", "v0"),
    optimizer=Optimizer("AdamW", (("lr", 0.05), ("weight_decay", 0.1), ("eps", 0.01))),
    steps=2,
)

# The same without dropout, so that eager PyTorch is a judge too.
_INSTEAD: dict[tuple[str, ...], str] = {("d0",): "{0} * 1.5", ("d1",): "{0} * 0.5"}
CALM = replace(
    VICTIM,
    body=tuple(replace(s, code=_INSTEAD.get(s.targets, s.code), random=False) for s in VICTIM.body),
)
