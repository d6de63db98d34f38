"""Options and settings of the whole suite."""

import os

import pytest

# Tests run side by side: one thread each, and no thread that spins while it waits for work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests change passes and kernels under the compiler's feet: each compiles anew.
os.environ["SHOESTRING_KEEP_PROGRAMS"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden texts anew")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden texts are to be written instead of compared."""
    return bool(request.config.getoption("--update-golden"))
