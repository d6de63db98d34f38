"""Factorizations, solvers and transforms: a batch of matrices, each by itself."""

from __future__ import annotations

from ..function import Op
from ..opdef import FactorMap, Kind, OpDef
from .aten import define
from .factors import keep_all_but, leading, normalize

# All operands and results begin with the same batch dimensions.
BATCHED_MATRICES = """
cholesky_inverse.default cholesky_solve.default geqrf.default
linalg_cholesky_ex.default linalg_eig.default linalg_householder_product.default
linalg_inv_ex.default linalg_ldl_factor_ex.default linalg_lu.default linalg_lu_factor_ex.default
linalg_lu_solve.default linalg_matrix_exp.default linalg_qr.default linalg_solve_triangular.default
ormqr.default _linalg_det.default _linalg_eigh.default _linalg_slogdet.default
_linalg_solve_ex.default _linalg_svd.default triangular_solve.default
""".split()


def transform_factors(op: Op) -> FactorMap:
    """Fourier transforms: the transformed dimensions stay whole."""
    rank = op.inputs[0].type.rank
    return keep_all_but(op, [normalize(d, rank) for d in op.attr("dim")])


def cross_factors(op: Op) -> FactorMap:
    return keep_all_but(op, [normalize(op.attr("dim"), op.results[0].type.rank)])


OPS: tuple[OpDef, ...] = (
    *(define(f"aten.{n}", Kind.OPAQUE, factors=leading(2)) for n in BATCHED_MATRICES),
    define("aten._fft_c2c.default", Kind.OPAQUE, factors=transform_factors),
    define("aten._fft_r2c.default", Kind.OPAQUE, factors=transform_factors),
    define("aten._fft_c2r.default", Kind.OPAQUE, factors=transform_factors),
    define("aten.linalg_cross.default", Kind.OPAQUE, factors=cross_factors),
)
