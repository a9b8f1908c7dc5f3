"""Tokens a second by number of threads, on a quiet machine and beside a process that keeps one core busy.

    python benchmarks/threads.py [MODEL] [--seconds S] [--write]

Prefill of 512 tokens and decode at a context of 64 tokens, greedy. The samples of all rows take turns, so
that whatever else happens on the machine hits all of them. The busy process does nothing but count; the
kernel gives it its share of the cores. Prints a table; --write keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from flatout.core.types import Workload, measurement
from flatout.engine.load import load
from flatout.hardware.detect import available_cores
from flatout.verify.drivers import RunnerDriver, workload_prompts
from record import measured_here, write

PREFILL, DECODE = Workload(batch=1, prompt=512, output=1), Workload(batch=1, prompt=64, output=64)


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """One core kept busy by somebody else, if wanted."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)  # until it counts
        yield
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=60, help="of all samples together")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= available_cores()]
    engines = {count: load(args.model, runner="cpu", threads=count) for count in counts}
    drivers = {count: RunnerDriver(engine.runner) for count, engine in engines.items()}
    tokenizer = engines[counts[0]].tokenizer
    prompt, start = (workload_prompts(tokenizer, work) for work in (PREFILL, DECODE))
    rates: dict[tuple[int, bool, str], list[float]] = {}
    end = time.monotonic() + args.seconds
    while time.monotonic() < end or len(next(iter(rates.values()))) < 3:
        for count, driver in drivers.items():
            for busy in (False, True):
                with busy_process(busy):
                    decode = [DECODE.output / driver.decode(start, DECODE.output) for _ in range(8)]
                    prefill = [PREFILL.prompt / driver.prefill(prompt) for _ in range(3)]
                rates.setdefault((count, busy, "decode"), []).extend(decode)
                rates.setdefault((count, busy, "prefill"), []).extend(prefill)
    rows = []
    print("| threads | beside | phase | tokens/s | 20 % to 80 % | of quiet | of one thread |")
    print("|--:|---|---|--:|---|--:|--:|")
    for (count, busy, phase), found in sorted(rates.items()):
        rate = measurement(phase, "token/s", found)
        quiet = measurement(phase, "token/s", rates[count, False, phase])
        single = measurement(phase, "token/s", rates[1, busy, phase])
        row = {
            "threads": count,
            "beside": "a busy process" if busy else "nothing",
            "phase": phase,
            "median": rate.median,
            "p20": rate.p20,
            "p80": rate.p80,
            "samples": rate.samples,
            "of_quiet": rate.median / quiet.median,
            "of_one_thread": rate.median / single.median,
        }
        rows.append(row)
        print(
            "| {threads} | {beside} | {phase} | {median:,.0f} | {p20:,.0f} to {p80:,.0f} | {of_quiet:.0%} "
            "| {of_one_thread:.2f}x |".format(**row)
        )
    if args.write:
        result = {**measured_here("numpy"), "model": args.model, "rows": rows}
        write("threads", result, " ".join(["python benchmarks/threads.py", *sys.argv[1:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
