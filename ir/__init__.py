"""The typed program: types, operations, functions, text, verifier and reference interpreter."""

from .builder import Builder, make_op
from .function import (
    STATE_ROLES,
    Function,
    Loc,
    Number,
    Op,
    Operand,
    Output,
    Param,
    Phase,
    Role,
    Value,
    map_operand,
    operand_values,
    same_structure,
)
from .interpreter import in_row_major_order, interpret, run_op
from .opdef import Cost, FactorMap, Kind, OpDef
from .ops import REGISTRY, core_set, lookup
from .python_dump import print_python
from .text import parse, print_function, print_op
from .tracing import Recording, Tracer, trace
from .types import (
    DENSE,
    DTYPE_NAMES,
    REPLICATED,
    Encoding,
    Sharding,
    Symbol,
    TensorType,
    parse_type,
    type_of,
)
from .verify import verify

__all__ = [
    "DENSE",
    "DTYPE_NAMES",
    "REGISTRY",
    "REPLICATED",
    "STATE_ROLES",
    "Builder",
    "Cost",
    "Encoding",
    "FactorMap",
    "Function",
    "Kind",
    "Loc",
    "Number",
    "Op",
    "OpDef",
    "Operand",
    "Output",
    "Param",
    "Phase",
    "Recording",
    "Role",
    "Sharding",
    "Symbol",
    "TensorType",
    "Tracer",
    "Value",
    "core_set",
    "in_row_major_order",
    "interpret",
    "lookup",
    "make_op",
    "map_operand",
    "operand_values",
    "parse",
    "parse_type",
    "print_function",
    "print_op",
    "print_python",
    "run_op",
    "same_structure",
    "trace",
    "type_of",
    "verify",
]
