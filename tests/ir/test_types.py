"""Types: sizes, text, symbols, encodings and shardings."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoestring.ir import DTYPE_NAMES, Encoding, Sharding, Symbol, TensorType, parse_type, type_of
from shoestring.ir.errors import IRError

AXES = st.lists(st.sampled_from(["dp", "tp", "pp", "cp"]), max_size=2, unique=True).map(tuple)
DIMS = st.integers(0, 2**40) | st.sampled_from([Symbol("batch"), Symbol("seq_len2")])


@st.composite
def types(draw: st.DrawFn) -> TensorType:
    shape = tuple(draw(st.lists(DIMS, max_size=5)))
    params = tuple(draw(st.lists(st.integers(1, 64), max_size=2)))
    kind = draw(st.sampled_from(["dense", "2:4", "block", "quantized"]))
    encoding = Encoding() if kind == "dense" else Encoding(kind, params)
    axes = draw(st.lists(AXES, min_size=len(shape), max_size=len(shape)))
    sharded = draw(st.booleans())
    sharding = Sharding(tuple(axes), draw(AXES)) if sharded else Sharding()
    return TensorType(draw(st.sampled_from(list(DTYPE_NAMES))), shape, encoding, sharding)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(types())
def test_text_gives_the_type_back(type_: TensorType) -> None:
    assert parse_type(str(type_)) == type_


def test_sizes() -> None:
    type_ = TensorType(torch.bfloat16, (8, 256))
    assert (type_.rank, type_.numel, type_.nbytes) == (2, 2048, 4096)
    assert str(type_) == "bf16[8,256]"
    assert type_.with_shape((3,)) == TensorType(torch.bfloat16, (3,))
    assert TensorType(torch.float32, ()).numel == 1
    assert TensorType(torch.float32, (4, 0)).nbytes == 0


def test_symbolic_dimensions_are_representable() -> None:
    type_ = TensorType(torch.float32, (Symbol("batch"), 4))
    assert str(type_) == "f32[batch,4]" and not type_.is_static
    with pytest.raises(IRError, match=r"SS2001.*a static shape is required, found f32\[batch,4\]"):
        _ = type_.static_shape


@pytest.mark.parametrize("text", ["", "f32", "f99[2]", "f32[2", "f32[2]x", "f32[2]<2:4"])
def test_what_is_not_a_type(text: str) -> None:
    with pytest.raises(IRError, match="SS2002.*a type such as"):
        parse_type(text)


# PyTorch warns of complex numbers of halves whatever is done with them.
@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("dtype", list(DTYPE_NAMES))
def test_type_of_a_tensor(dtype: torch.dtype) -> None:
    tensor = torch.empty(2, 0, 3, dtype=dtype, device="meta")
    assert type_of(tensor) == TensorType(dtype, (2, 0, 3))
