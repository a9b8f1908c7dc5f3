"""`flatout COMMAND ...`: finds the command's module, runs it, and turns errors into one line and an exit
code.

A command is a module flatout.cli.NAME with a function NAME whose annotations Typer reads; it returns None or
an exit code. Only the module of the command that was asked for is imported, so `flatout --version` loads
nothing heavy. Exit codes: 0 done, 2 user error, 3 the budget cannot be met, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from importlib import import_module

from flatout._version import __version__
from flatout.errors import ConfigError, FlatoutError, ResourceError, nearest

COMMANDS = {
    "doctor": "hardware, compilers and libraries: what is there, what is missing, how to get it",
    "profile": "ceilings of this machine, floor of a model, time and fraction of floor of each operator",
    "optimize": "search formats under a quality budget, prove speed and quality, write an artifact",
    "verify": "certificate and speed test of a checkpoint against its original; recompute a certificate",
    "export": "a model as GGUF, as an ordinary folder of any recipe, or entropy-coded for transfer",
    "bench": "side by side with other engines: same weights, prompts and threads, taking turns",
    "fpga": "compile to an accelerator, simulate it cycle by cycle, compare, fit to a board",
    "train": "train from scratch, from a checkpoint or from a teacher, as a recipe in Python says",
    "run": "generate text with an artifact or a checkpoint, or talk when no prompt is given",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except FlatoutError as error:
        return _fail(error, "--json" in args)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        sys.stderr.close()  # the reader left (`flatout ... | head`); Python would complain again at exit
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = ResourceError("the disk must have room for the result", str(error), "free some space")
        return _fail(full, "--json" in args)


def _dispatch(args: list[str]) -> int:
    if args[:1] in (["--version"], ["-V"]):
        print(f"flatout {__version__}")
        return 0
    if not args or args[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    name = args[0]
    if name not in COMMANDS:
        remedy = nearest(name, COMMANDS, "--help")
        raise ConfigError(f"the command is one of {', '.join(COMMANDS)}", repr(name), f"flatout {remedy}")
    return _run(name, args[1:])


def _run(name: str, args: list[str]) -> int:
    import typer
    from typer.exceptions import TyperException

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name)(getattr(import_module(f"flatout.cli.{name}"), name))
    try:
        code = app(args, prog_name=f"flatout {name}", standalone_mode=False)
    except TyperException as error:
        raise ConfigError(error.format_message(), remedy=f"flatout {name} --help") from error
    except typer.Abort:
        return _interrupted()
    if code == 130:  # Typer turns Ctrl-C into this exit code
        return _interrupted()
    return code if isinstance(code, int) else 0


def _fail(error: FlatoutError, as_json: bool) -> int:
    print(f"flatout: error: {error}", file=sys.stderr)
    if as_json:
        detail = {"rule": error.rule, "value": error.value, "remedy": error.remedy}
        print(json.dumps({"error": {"type": type(error).__name__, **detail}, "exit_code": error.exit_code}))
    return error.exit_code


def _interrupted() -> int:
    print("flatout: interrupted; nothing half-written was left", file=sys.stderr)
    return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "flatout makes a language model run as fast as the hardware allows, and proves it.\n\n"
        f"usage: flatout COMMAND [OPTIONS]\n\n{rows}\n\n"
        "flatout COMMAND --help explains one command; flatout --version prints the version.\n"
        "A first run: flatout optimize smollm2-135m --max-loss 1% --out artifact"
    )


if __name__ == "__main__":
    sys.exit(main())
