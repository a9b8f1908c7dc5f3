"""The inside of a worker process: `python serve.py PEER` answers requests until its input ends.

One JSON object a line comes in, {"command": ..., other keys are arguments}; one a line goes out, {"value":
...} or {"error": ...}. PEER is a module, workers.llama for instance, whose class Peer has a method for each
of COMMANDS that it knows. Standard library only: the interpreter is that of the peer's environment.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

COMMANDS = ("convert", "load", "first", "prefill", "decode", "score")

_PR_SET_PDEATHSIG = 1


def answer(peer: object, line: str) -> dict[str, Any]:
    """Run the command in `line`. Whatever goes wrong becomes an {"error": ...}."""
    try:
        message = json.loads(line)
        command = message.pop("command")
        if command not in COMMANDS:
            raise ValueError(f"no command {command!r}")
        return {"value": getattr(peer, command)(**message)}
    except Exception as error:  # the boundary of the process: the other side decides what is fatal
        return {"error": f"{type(error).__name__}: {error}"}


def die_with_parent() -> None:
    """Be killed when the parent is, even in the middle of a command (Linux; elsewhere the end of input
    suffices)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with answers
    # This folder is a package here, and no module of it may stand before a library of the same name.
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).parents[1]))
    peer = importlib.import_module(sys.argv[1]).Peer()
    for line in sys.stdin:
        channel.write(json.dumps(answer(peer, line)) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
