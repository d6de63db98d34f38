"""Instruction sets that tests of kernels go through."""

from __future__ import annotations

import pytest

from shoestring.backends.c.build import cpu_identity
from shoestring.backends.c.room import this_machine

AVX2 = {"avx2", "fma"}
NEEDS: dict[str, set[str]] = {
    "native": set(), "generic": set(), "avx2": AVX2,
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "emulated-avx512": AVX2, "emulated-amx": AVX2,
}  # fmt: skip


@pytest.fixture(params=NEEDS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `$SHOESTRING_ISA` says during a test, which runs once for each that this machine has."""
    name = str(request.param)
    if not NEEDS[name] <= set(cpu_identity().split()):
        pytest.skip(f"this machine has no {name}")
    own = this_machine()
    monkeypatch.setenv("SHOESTRING_ISA", name)
    if name == "avx2" and this_machine() == own:
        pytest.skip("the machine's own kernels, which `native` goes through, are those of avx2")
    return name
