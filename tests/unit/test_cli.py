"""The command line: what goes to stdout and stderr, exit codes, and a list of every flag there is."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from report_sample import sample

from flatout._version import __version__
from flatout.cli import main as module
from flatout.cli.main import COMMANDS, main
from flatout.cli.optimize import summary
from flatout.cli.output import Progress
from flatout.errors import ModelFileError, ResourceError

FLAGS = {
    "doctor": {"--json"},
    "profile": {"--batch", "--prompt", "--output", "--threads", "--tune", "--power-cap", "--json"},
    "optimize": {
        "--out", "--max-loss", "--recipe", "--objective", "--workload", "--text", "--trace", "--portable",
        "--max-memory", "--dollars-per-hour", "--threads", "--recover", "--fresh", "--resume", "--json",
    },
    "verify": {
        "--against", "--margin", "--text", "--task", "--task-margin", "--limit", "--speed-seconds", "--rerun",
        "--json",
    },
    "export": {"--to", "--out", "--recipe", "--vocabulary", "--text", "--json"},
    "bench": {"--against", "--original", "--threads", "--rounds", "--passages", "--out", "--json"},
    "fpga": {
        "--board", "--recipe", "--tokens", "--context", "--columns", "--answer", "--explore", "--synth",
        "--out", "--report", "--json",
    },
    "train": {"--out", "--fresh", "--resume", "--json"},
    "run": {
        "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--threads", "--runner",
        "--speculate", "--draft", "--gpus", "--json",
    },
}  # fmt: skip
"""A flag must prove its need: adding one means adding it here."""


def flags_of(command: str) -> set[str]:
    """Every long option of a command, from its annotations."""
    function = getattr(import_module(f"flatout.cli.{command}"), command)
    hints = get_type_hints(function, include_extras=True)
    found: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        (info,) = hints[name].__metadata__
        if type(info).__name__ == "OptionInfo":
            declared = [info.default, *(info.param_decls or ())]
            names = [d for d in declared if isinstance(d, str) and d.startswith("--")]
            spelled = "/".join(names) or f"--{name.replace('_', '-')}"
            found.update(spelled.split("/"))
        assert parameter.kind is not parameter.VAR_KEYWORD
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_listed(command: str) -> None:
    assert flags_of(command) == FLAGS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"flatout {command}" in out
    assert "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flatout {__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)


def test_a_mistyped_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimise", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("found: 'optimise'; try: flatout optimize\n")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["optimize", "m", "--out", "o", "--max-los", "1%"],
        ["optimize", "m"],
        ["optimize"],
        ["optimize", "m", "--out", "o", "--threads", "many"],
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flatout: error: ")
    assert captured.err.endswith("try: flatout optimize --help\n")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("loss", ["-1%", "abc", "nan", "101%"])
def test_a_nonsense_budget_is_exit_code_2(
    loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["optimize", "no-such-model", "--out", str(tmp_path / "o"), f"--max-loss={loss}"]) == 2
    assert "--max-loss is a perplexity increase above 0% and below 100%" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def command(monkeypatch: pytest.MonkeyPatch, body: Callable[[], Any]) -> None:
    """`flatout doctor` does `body` instead."""

    def doctor(as_json: bool = False) -> Any:
        return body()

    monkeypatch.setattr(import_module("flatout.cli.doctor"), "doctor", doctor)


def raising(error: BaseException) -> Callable[[], Any]:
    def body() -> Any:
        raise error

    return body


def test_errors_are_one_line_with_rule_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, raising(ModelFileError("a rule", "a value", "a remedy")))
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "flatout: error: a rule; found: a value; try: a remedy\n"


def test_errors_under_json_are_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, raising(ResourceError("a rule", "a value", "a remedy")))
    monkeypatch.setattr(module, "COMMANDS", {"doctor": ""})
    assert main(["doctor", "--as-json"]) == 2
    assert capsys.readouterr().out == ""
    assert module._fail(ResourceError("a rule", "a value", "a remedy"), as_json=True) == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "error": {"type": "ResourceError", "rule": "a rule", "value": "a value", "remedy": "a remedy"},
        "exit_code": 2,
    }


def test_ctrl_c_is_one_line_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "flatout: interrupted; nothing half-written was left\n"
    assert captured.out == ""


def test_a_full_disk_is_an_error_not_a_stack_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, raising(OSError(28, "No space left on device", "/out/model.safetensors")))
    assert main(["doctor"]) == 2
    assert "the disk must have room for the result" in capsys.readouterr().err


def test_a_bug_keeps_its_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_the_exit_code_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, lambda: 3)
    assert main(["doctor"]) == 3
    command(monkeypatch, lambda: None)
    assert main(["doctor"]) == 0


@pytest.fixture
def fake_search(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`flatout optimize` returns the sample; what it was called with is in the dictionary."""
    seen: dict[str, Any] = {"result": sample()}

    def optimize(model: Any, out: Any, **options: Any) -> dict[str, Any]:
        seen.update(model=model, out=out, options=options)
        options["note"]("a note")
        result: dict[str, Any] = seen["result"]
        return result

    monkeypatch.setattr("flatout.report.optimize.optimize", optimize)
    return seen


def test_optimize_prints_three_columns_and_what_to_type_next(
    fake_search: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["optimize", "smollm2-135m", "--out", "demo/artifact", "--max-loss", "2%", "--fresh"]) == 0
    captured = capsys.readouterr()
    assert fake_search["model"] == "smollm2-135m"
    assert fake_search["options"]["max_loss"] == "2%"
    assert fake_search["options"]["fresh"] is True
    assert captured.err == "a note\n"
    lines = captured.out.splitlines()
    assert lines[-1] == "next: flatout run demo/artifact"
    header = next(line for line in lines if "transformers bf16" in line)
    assert header.split("  ")[-1] == "engine, optimised"
    decode = next(line for line in lines if line.startswith("decode tok/s"))
    assert "43.2 (12 % of floor)" in decode
    assert "786 (83 % of floor)" in decode
    assert any(line.startswith("loss") and "+0.31 % (at most +0.48 %)" in line for line in lines)


def test_optimize_json_is_one_object_on_stdout(
    fake_search: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["optimize", "m", "--out", "o", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["speedup"]["decode"] == 18.2


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 3)])
def test_recovering_climbs_with_the_recipe(
    passed: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def recover(model: str, out: Path, recipe: str, **options: Any) -> dict[str, Any]:
        seen.update(model=model, out=out, recipe=recipe, **options)
        return {"passed": passed, "verdict": "gptq is certified", "artifact": str(out)}

    monkeypatch.setattr("flatout.search.recovery.recover", recover)
    arguments = ["optimize", "m", "--out", "o", "--recover", "--recipe", "w4a8-g64", "--max-loss", "3%"]
    assert main([*arguments, "--fresh"]) == code
    assert (seen["model"], seen["out"], seen["recipe"]) == ("m", Path("o"), "w4a8-g64")
    assert (seen["max_loss"], seen["fresh"]) == ("3%", True)
    assert capsys.readouterr().out == "gptq is certified\nnext: flatout run o\n"


def test_recovering_needs_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "m", "--out", "o", "--recover"]) == 2
    assert "--recipe w4a8-g64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--objective energy", "--workload 512+64x1", "--trace t.csv", "--portable vllm", "--max-memory 800MB",
     "--dollars-per-hour 0"],
)  # fmt: skip
def test_recovering_refuses_what_only_a_search_reads(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flatout.search.recovery.recover", lambda *_, **__: pytest.fail("climbed"))
    arguments = ["optimize", "m", "--out", "o", "--recover", "--recipe", "w4a8-g64", *option.split()]
    assert main(arguments) == 2
    name = option.split()[0]
    rule = "--recover takes --recipe, --max-loss, --text, --threads and --fresh"
    assert f"{rule}; found: {name}; try: without" in capsys.readouterr().err


def test_a_budget_that_is_not_met_is_exit_code_3(
    fake_search: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_search["result"] |= {"passed": False, "verdict": "Nothing beat the original."}
    assert main(["optimize", "m", "--out", "o", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert captured.err.endswith("flatout: the budget cannot be met: Nothing beat the original.\n")


def test_the_summary_survives_an_undecided_certificate() -> None:
    result = sample()
    result["quality"].update(upper_bound=None, verdict="cannot_decide", passed=False)
    result["optimized"].update(loss_upper_bound=None)
    assert "certificate cannot decide" in summary(result)


def test_a_terminal_sees_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage lasts while what stands before its comma does, and work of an earlier run is no measure."""
    clock = iter([10.0, 12.0, 14.0, 16.0])
    monkeypatch.setattr("flatout.cli.output.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress()
    for stage, done in (("training", 41), ("training, loss 2", 42), ("training, loss 1", 43), ("other", 43)):
        progress(stage, done, 50)
    assert capsys.readouterr().err.split("\r\x1b[K")[1:] == [
        "training 41/50",
        "training, loss 2 42/50, 16 s left",
        "training, loss 1 43/50, 14 s left",
        "other 43/50",
    ]
