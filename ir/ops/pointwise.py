"""Pointwise ops: one result element from one element of each operand, with broadcasting."""

from __future__ import annotations

from ..opdef import Kind, OpDef
from .aten import define
from .factors import broadcast

# Unary, all of overload `default`.
CORE = {
    "abs": "The absolute value; of a complex number, its modulus.",
    "acos": "The arc cosine, in radians.",
    "acosh": "The inverse hyperbolic cosine.",
    "asin": "The arc sine, in radians.",
    "asinh": "The inverse hyperbolic sine.",
    "atan": "The arc tangent, in radians.",
    "atanh": "The inverse hyperbolic tangent.",
    "bitwise_not": "Every bit inverted; of bools, the logical not.",
    "ceil": "The smallest whole number that is not less.",
    "cos": "The cosine of radians.",
    "cosh": "The hyperbolic cosine.",
    "erf": "The error function.",
    "erfc": "One minus the error function.",
    "exp": "e to the power of x.",
    "exp2": "Two to the power of x.",
    "expm1": "exp(x) - 1, exact near zero.",
    "floor": "The largest whole number that is not greater.",
    "isinf": "Whether an element is an infinity.",
    "isnan": "Whether an element is not a number.",
    "lgamma": "The logarithm of the absolute value of the gamma function.",
    "log": "The natural logarithm.",
    "log10": "The logarithm to the base 10.",
    "log1p": "log(1 + x), exact near zero.",
    "log2": "The logarithm to the base 2.",
    "logical_not": "Whether an element is zero.",
    "neg": "Minus x.",
    "reciprocal": "One divided by x.",
    "relu": "max(x, 0); a NaN stays.",
    "round": "The nearest whole number, halves to even; to `decimals` digits.",
    "rsqrt": "One divided by the square root.",
    "sigmoid": "1 / (1 + exp(-x)).",
    "sign": "-1, 0 or 1.",
    "sin": "The sine of radians.",
    "sinh": "The hyperbolic sine.",
    "sqrt": "The square root.",
    "tan": "The tangent of radians.",
    "tanh": "The hyperbolic tangent.",
    "trunc": "The whole part, towards zero.",
}
CORE_BINARY = {
    "add.Tensor": "x + alpha * y.",
    "atan2.default": "The angle of the point (y, x), in radians.",
    "bitwise_and.Tensor": "The and of every bit.",
    "bitwise_or.Tensor": "The or of every bit.",
    "bitwise_xor.Tensor": "The exclusive or of every bit.",
    "div.Tensor": "x / y; whole numbers give floats.",
    "div.Tensor_mode": "x / y, rounded as `rounding_mode` says: `floor`, `trunc` or not.",
    "eq.Tensor": "Whether x equals y.",
    "fmod.Tensor": "The remainder with the sign of x.",
    "ge.Tensor": "Whether x >= y.",
    "gt.Tensor": "Whether x > y.",
    "le.Tensor": "Whether x <= y.",
    "logical_and.default": "Whether both are not zero.",
    "logical_or.default": "Whether one is not zero.",
    "logical_xor.default": "Whether exactly one is not zero.",
    "lt.Tensor": "Whether x < y.",
    "maximum.default": "The greater of both; NaN where one is.",
    "minimum.default": "The lesser of both; NaN where one is.",
    "mul.Tensor": "x * y.",
    "ne.Tensor": "Whether x differs from y.",
    "pow.Tensor_Tensor": "x to the power of y.",
    "remainder.Tensor": "The remainder with the sign of y.",
    "sub.Tensor": "x - alpha * y.",
    "where.self": "x where the condition holds, y elsewhere.",
}
SUGAR = """
add.Scalar sub.Scalar mul.Scalar div.Scalar div.Scalar_mode rsub.Scalar rsub.Tensor eq.Scalar
ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar pow.Tensor_Scalar pow.Scalar fmod.Scalar
remainder.Scalar bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar
bitwise_left_shift.Tensor bitwise_right_shift.Tensor 
clamp.default clamp.Tensor clamp_min.default clamp_min.Tensor clamp_max.default clamp_max.Tensor
addcmul.default addcdiv.default lerp.Scalar lerp.Tensor square.default frac.default sgn.default
gelu.default gelu_backward.default silu.default silu_backward.default mish.default
mish_backward.default elu.default elu_backward.default leaky_relu.default
leaky_relu_backward.default hardtanh.default hardtanh_backward.default hardsigmoid.default
hardsigmoid_backward.default hardswish.default hardswish_backward.default softplus.default
softplus_backward.default threshold.default threshold_backward.default sigmoid_backward.default
tanh_backward.default log_sigmoid_forward.default log_sigmoid_backward.default
masked_fill.Scalar masked_fill.Tensor where.ScalarOther where.ScalarSelf where.Scalar
floor_divide.default floor_divide.Scalar copysign.Tensor copysign.Scalar fmax.default fmin.default
hypot.default logaddexp.default logaddexp2.default nan_to_num.default isposinf.default
isneginf.default signbit.default erfinv.default digamma.default
special_erfcx.default i0.default special_entr.default special_log_ndtr.default heaviside.default
xlogy.Tensor xlogy.Scalar_Other xlogy.Scalar_Self deg2rad.default rad2deg.default sinc.default
logit.default logit_backward.default softshrink.default softshrink_backward.default
hardshrink.default hardshrink_backward.default polygamma.default 
nextafter.default gcd.default lcm.default mvlgamma.default special_ndtri.default
special_i0e.default special_i1.default special_i1e.default
zeros_like.default ones_like.default full_like.default fill.Scalar fill.Tensor copy.default
native_dropout_backward.default _prelu_kernel.default _prelu_kernel_backward.default
angle.default conj_physical.default 
complex.default polar.default positive.default igamma.default
igammac.default ldexp.Tensor special_xlog1py.default special_zeta.default
special_bessel_j0.default special_bessel_j1.default
rrelu_with_noise_backward.default
""".split()
# Copies of the same elements: a new element type, or none.
COPIES = {
    "_to_copy.default": "The same elements, converted to `dtype`.",
    "clone.default": "The same elements.",
}


def _defs() -> tuple[OpDef, ...]:
    unary = {f"{name}.default": doc for name, doc in CORE.items()}
    core = [
        define(f"aten.{name}", Kind.POINTWISE, factors=broadcast, core=True, doc=doc)
        for name, doc in {**unary, **CORE_BINARY, **COPIES}.items()
    ]
    sugar = [define(f"aten.{name}", Kind.POINTWISE, factors=broadcast) for name in SUGAR]
    return (*core, *sugar)


OPS = _defs()
