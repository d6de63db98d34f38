"""The contenders of the benchmark at tiny sizes: equal losses, and the pipe between processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.steps.child import Order
from benchmarks.steps.processes import Child, Failed, child_environment, take_turns
from benchmarks.steps.results import difference, limit
from benchmarks.steps.runners import Runner, make_runner
from benchmarks.workloads import ALL, build

STEPS = 4


def losses(contender: str, workload: str) -> tuple[list[float], Runner]:
    runner = make_runner(contender, "fp32")
    runner.imports()
    runner.setup(build(workload, tiny=True))
    return [runner.step() for _ in range(STEPS)], runner


@pytest.mark.parametrize("workload", [w for w in ALL if w != "lstm-long"])
def test_losses_are_those_of_eager(workload: str) -> None:
    drops = build(workload, tiny=True).drops
    assert drops == workload.endswith("dropout")
    wanted, _ = losses("eager", workload)
    found, runner = losses("shoestring", workload)
    assert difference(found, wanted) <= limit("fp32", drops)
    assert wanted[-1] < wanted[0] or drops
    assert runner.facts()["work"]["product_flops"] > 0


@pytest.mark.parametrize("workload", ["gpt", "mlp"])
def test_losses_of_jax_are_those_of_eager(
    workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax", reason="of the extra `bench`")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert difference(losses("jax", workload)[0], losses("eager", workload)[0]) <= limit("fp32")


def test_children_take_turns(tmp_path: Path) -> None:
    environment = child_environment(1, tmp_path, None)
    child = Child(Order("mlp", "shoestring", "fp32", True, 3), environment, tmp_path / "log", 120)
    try:
        child.start()
        assert len(child.hello["losses"]) == 3 and child.hello["predicted"] > 0
        answers, _ = take_turns([child], rounds=2, turn_seconds=0.0)
        assert [len(turn["losses"]) for turn in answers[child]] == [3, 3]
        assert answers[child][0]["peak"] > child.hello["baseline"] > 0
        assert child.ask(profile=1)["profile"][0]["ms"] > 0
    finally:
        child.close()


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    environment = child_environment(1, tmp_path, None)
    child = Child(Order("nothing", "eager", "fp32", True, 3), environment, tmp_path / "log", 120)
    try:
        with pytest.raises(Failed, match="KeyError: 'nothing'"):
            child.start()
    finally:
        child.close()
