"""Every pass's docstring shows what it does: before becomes after."""

import re

import pytest

from shoestring.ir import parse, print_function, same_structure, verify
from shoestring.passes import Pass
from shoestring.passes.registry import BUILTIN

FUNC = re.compile(r"^ *func @.*?^ *\}$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.__module__.rpartition(".")[2])
def test_docstring_example(cls: type[Pass]) -> None:
    texts = FUNC.findall(cls.__doc__ or "")
    assert texts and len(texts) % 2 == 0
    for before, after in zip(texts[::2], texts[1::2], strict=True):
        verify(parse(before))
        result, report = cls().run(parse(before))
        verify(result)
        assert report.changed > 0
        assert print_function(result) == print_function(parse(after))
        assert same_structure(result, parse(after))


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.__module__.rpartition(".")[2])
def test_module_class_and_doc(cls: type[Pass]) -> None:
    name = cls.__module__.rpartition(".")[2]
    assert cls.__name__ == "".join(word.capitalize() for word in name.split("_"))
    assert cls().name == name
    assert cls().doc.endswith(".")
