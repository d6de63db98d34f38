"""Instruction sets that tests of kernels go through."""

from __future__ import annotations

import pytest

from shoestring.backends.c.build import cpu_identity

AVX2 = {"avx2", "fma"}
NEEDS: dict[str, set[str]] = {
    "native": set(), "generic": set(), "avx2": AVX2,
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "emulated-avx512": AVX2, "emulated-amx": AVX2,
}  # fmt: skip


@pytest.fixture(params=NEEDS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `$SHOESTRING_ISA` says during a test, which runs once for each that this machine has."""
    name, has = str(request.param), set(cpu_identity().split())
    if not NEEDS[name] <= has:
        pytest.skip(f"this machine has no {name}")
    if name == "avx2" and not NEEDS["avx512"] <= has:
        pytest.skip("of the machine itself")
    monkeypatch.setenv("SHOESTRING_ISA", name)
    return name
