"""The command line: names, texts of errors, exit codes, and a short run of each command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoestring.cli import main

TINY = "--layers 1 --width 16 --heads 2 --batch 2 --seq 16".split()

IDENTITY = """func @f {
  batch %x: f32[2,3] "#batch.0"
  %y: f32[2,3] = aten.neg.default(%x) loc("model.py":3 "layer" forward)
  %z: f32[2,3] = aten.neg.default(%y)
  %dead: f32[2,3] = aten.exp.default(%x)
  return out=%z
}
"""


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a command that fails with a coded error."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


# --- texts of errors ----------------------------------------------------------------------------

GOLDEN = {
    "trian": "error [SS7001] trian is no command\n  help: did you mean train?\n",
    "train --stps 3": (
        "error [SS7001] --stps is no option of `shoestring train`\n  help: did you mean --steps?\n"
    ),
    "train --layer=3": (
        "error [SS7001] --layer is no option of `shoestring train`\n"
        "  help: did you mean --layers?\n"
    ),
    "train --steps 0": "error [SS7005] --steps must be 1 or more, found 0\n",
    "train --width 7 --heads 2": (
        "error [SS7005] --width must be a multiple of --heads, found 7 and 2\n"
    ),
    "train --dropout 1": "error [SS7005] --dropout must lie in [0, 1), found 1.0\n",
    "train --precision bf61": (
        "error [SS7013] the name of a precision is required, found 'bf61'\n"
        "  help: did you mean 'bf16'?\n"
    ),
    "train --lr nan": "error [SS7005] --lr must be greater than 0, found nan\n",
    "train --resume": (
        "error [SS7008] --resume needs the folder to resume from\n  help: add --out\n"
    ),
    "train --text /no/such/file": (
        "error [SS7002] reading the text: a readable file is required: No such file or directory\n"
        "  at /no/such/file\n"
    ),
    "train --text /dev/null": (
        "error [SS7003] a window of 256 tokens is required, the text has 0\n"
        "  help: give a longer text or a smaller --seq\n"
    ),
    "train --backend d --steps 1": (
        "error [SS4001] a known backend is required, found 'd'\n  help: known: c, reference\n"
    ),
    "opt /no/such/file": (
        "error [SS7002] reading a function: a readable text file is required: [Errno 2] No such"
        " file or directory: '/no/such/file'\n  at /no/such/file\n"
    ),
    "opt --passes dead_code{": (
        "error [SS7006] reading --passes: a closing brace, bracket or quote is required, found"
        " 'dead_code{'\n  help: for example --passes canonicalize dead_code\n"
    ),
    "opt --passes fold_constants{limit=x}": (
        "error [SS7006] reading --passes: limit of fold_constants is of type int, found 'x'\n"
    ),
    "opt --passes dead_cod": (
        "error [SS3001] looking up a pass: the name of a pass is required, found 'dead_cod'\n"
        "  help: did you mean 'dead_code'?\n"
    ),
    "explain --model nonsense": (
        "error [SS7004] --model must be module:factory, found 'nonsense'\n"
    ),
    "explain --model math:nonsense": (
        "error [SS7004] --model math:nonsense: module 'math' has no attribute 'nonsense'\n"
    ),
    "verify --steps 0": "error [SS7005] --steps must be 1 or more, found 0\n",
}


@pytest.mark.parametrize("arguments", GOLDEN)
def test_error_texts(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, *arguments.split()) == GOLDEN[arguments]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "[SS7008]" in error


@pytest.mark.parametrize("arguments", [["train", "--steps", "x"], ["train", "--compare", "y"], []])
def test_wrong_values_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "opt", "explain", "verify"])
def test_every_option_is_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from shoestring.cli import COMMANDS
    from shoestring.cli.arguments import option_names

    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    named = [n for n in option_names(COMMANDS[command]) if n != "--file"]
    assert all(n in text for n in named)


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoestring", "train", "--stesp", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error [SS7001] --stesp is no option of `shoestring train`")


# --- opt ----------------------------------------------------------------------------------------


def test_opt_runs_passes_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.txt").write_text(IDENTITY)
    assert main(["opt", str(tmp_path / "f.txt"), "--passes", "dead_code"]) == 0
    out = capsys.readouterr().out
    assert out == IDENTITY.replace("  %dead: f32[2,3] = aten.exp.default(%x)\n", "")
    assert main(["opt", str(tmp_path / "f.txt"), "--no-locs", "--out", str(tmp_path / "g")]) == 0
    assert "return out=%x" in (tmp_path / "g").read_text()


def test_opt_reads_a_pipe_and_shows_each_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(IDENTITY))
    assert main(["opt", "--passes", "dead_code,simplify_algebra", "--print-after"]) == 0
    captured = capsys.readouterr()
    assert "// after dead_code\nfunc @f {" in captured.err
    assert captured.out.startswith("func @f {")


def test_opt_lists_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "--list"]) == 0
    assert "dead_code [exact]" in capsys.readouterr().out


def test_pass_options_are_read() -> None:
    from shoestring.cli.opt import _split, _value

    assert _split('a{x=1,y="b, c"} b, c{z=[1, 2]}', "") == ['a{x=1,y="b, c"}', "b", "c{z=[1, 2]}"]
    values = ["true", "none", "3", "-1.5e3", '"a b"', "word", "[1, 2.5]", "[]"]
    expected: list[Any] = [True, None, 3, -1500.0, "a b", "word", (1, 2.5), ()]
    assert [_value(v, "") for v in values] == expected


# --- train, explain, verify ---------------------------------------------------------------------


def test_train_resume_and_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, metrics = ["--out", str(tmp_path / "run")], ["--metrics", str(tmp_path / "m")]
    common = ["train", *TINY, "--warmup", "1", *out, *metrics]
    assert main([*common, "--steps", "3", "--trace", str(tmp_path / "t")]) == 0
    text = capsys.readouterr().out
    assert "step 3/3" in text and "trained 3 steps; checkpoint" in text and "\x1b" not in text
    events = json.loads((tmp_path / "t").read_text())["traceEvents"]
    assert len([e for e in events if e["ph"] == "X"]) > 20
    assert main([*common, "--steps", "5", "--resume"]) == 0
    assert "resumed from" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["validation_loss"] > 0
    assert main([*common, "--steps", "5", "--resume", "--width", "32"]) == 2
    assert "[SS6008]" in capsys.readouterr().err


def test_compare_with_eager(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    assert main(["train", *TINY, "--steps", "3", "--compare", "eager", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "loss, shoestring" in text and "median step" in text and "compile, warm" in text
    found = json.loads(file.read_text())
    assert len(found["shoestring"]["losses"]) == len(found["eager"]["losses"]) == 3
    assert found["ratios"]["largest_loss_relative_difference"] < 1e-5
    assert found["eager"]["peak"] > found["eager"]["baseline"] > 0
    assert found["machine"]["cores"]


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *TINY, "--top", "4"]) == 0
    text = capsys.readouterr().out
    assert "canonicalize" in text and "memory:" in text and "cost of a step" in text
    assert "aten.mm" in text and "time of a step" in text and "of peak" in text


def test_explain_a_model_of_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    model = torch.nn.Linear(3, 2)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    return model, lambda m, x: m(x).square().mean(), optimizer, (torch.ones(4, 3),)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert main(["explain", "--model", "my_net:make"]) == 0
    assert "weight" in capsys.readouterr().out
    assert main(["verify", "--model", "my_net:make", "--steps", "2"]) == 0
    assert "agrees with PyTorch" in capsys.readouterr().out
    assert "found int" in failure(capsys, "verify", "--model", "my_net:wrong")


def test_passes_get_options_of_their_types() -> None:
    from shoestring.cli.opt import parse_passes

    (one,) = parse_passes("decompose{keep=[aten.silu.default]}")
    assert getattr(one, "keep", None) == frozenset({"aten.silu.default"})


def test_precision(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Takes half a minute; `test_compare_with_eager` does it.
    monkeypatch.setattr("shoestring.cli.train.measure_compile", lambda *_: (2.0, 1.0))
    assert main(["train", *TINY, "--steps", "2", "--precision", "bf16", "--compare", "eager"]) == 0
    assert "bf16" in capsys.readouterr().out
    assert main(["verify", *TINY, "--steps", "2", "--precision", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "pass lower_precision (lossy): not compared, changes the numbers" in text


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *TINY, "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "pass dead_code (exact): compared, agrees" in text
    assert "the compiled step agrees with PyTorch" in text
    assert main(["verify", *TINY, "--steps", "2", "--tolerance", "-1", "--no-passes"]) == 1
