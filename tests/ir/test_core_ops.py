"""The registry: every core op is described, and the page about them is up to date."""

import importlib.util
from pathlib import Path

import pytest

from shoestring.ir import REGISTRY, OpDef, core_set, lookup
from shoestring.ir.errors import IRError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("op", core_set(), ids=lambda op: op.name)
def test_a_core_op_has_one_sentence(op: OpDef) -> None:
    assert op.doc.endswith(".") and "\n" not in op.doc


def test_size_of_the_core_set() -> None:
    assert 70 <= len(core_set()) <= 140


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DOCS / "core-ops.md").read_text() == generate.page(), "run `python docs/generate.py`"


def test_names_are_those_of_the_registry() -> None:
    assert all(lookup(name) is op and op.name == name for name, op in REGISTRY.items())


def test_an_op_without_an_entry_has_its_schema() -> None:
    op = lookup("aten.addcmul_.default")
    assert op.operand_names == ("self", "tensor1", "tensor2")
    assert op.attr_defaults == {"value": 1} and not op.core


def test_an_unknown_op() -> None:
    with pytest.raises(IRError, match="SS2003"):
        lookup("aten.no_such_op.default")
