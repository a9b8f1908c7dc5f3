"""How fast the rows of benchmarks/methods.py run: a quick pass of its own, for which nothing else may run.

    decode     one sequence, each of 96 steps behind 64 tokens timed by itself
    prefill    a prompt of 512 tokens, nine times
    texts      an encoder's, of 128 tokens, one at a time, 300 times

Medians, on the CPU engine. Codes do not change how long a product takes, so rows of the same formats share
one measurement, of weights rounded to nearest, whatever method chose their codes; it multiplies zeros like
other weights, so pruned rows are as fast as whole ones. What the engine does not run is left out, with the
reason in `no_speed`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.apply import compress
from flatout.core.checkpoint import Checkpoint
from flatout.core.encoder_folder import open_encoder
from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.engine.cpu import CpuRunner, check_formats
from flatout.engine.encoder import Encoder
from flatout.engine.runner import StepInput
from flatout.errors import ConfigError
from flatout.search.encoder_recipes import encoder_from_name, parse_encoder_recipe
from methods_page import write_record
from record import ROOT, commit_of, measured_here

_PROMPT, _CONTEXT, _STEPS, _TRIES = 512, 64, 96, 9
_TEXT_TOKENS, _TEXTS = 128, 300
_RATES = ("decode_tokens_per_s", "prefill_tokens_per_s", "texts_per_s", "no_speed")


def add_speeds(
    path: Path,
    source: Checkpoint,
    recipe_of: Callable[[str], Recipe],
    threads: int,
    command: str,
    new: bool = False,
) -> Path:
    """Time every row of the results file `path` of decoder `source` and write it back. recipe_of: what a row
    is made by. new: only rows that have no speed yet; those of the same formats as one that has take its."""

    def speed(name: str) -> tuple[str, Callable[[], dict[str, Any]]]:
        if " " in name:
            reason = {"no_speed": "another program's weights, judged as floats"}
            return name, lambda: reason
        recipe = replace(recipe_of(name), name="timed", method="rtn", sparsity="")
        return repr(recipe), lambda: _decoder_speed(source, recipe, threads)

    return _fill(path, speed, threads, command, new)


def add_encoder_speeds(path: Path, model: str, threads: int, command: str, new: bool = False) -> Path:
    """As add_speeds, of an encoder."""
    checkpoint = open_encoder(model)

    def speed(name: str) -> tuple[str, Callable[[], dict[str, Any]]]:
        recipe = parse_encoder_recipe(name, checkpoint.spec)

        def measure() -> dict[str, Any]:
            model = encoder_from_name(checkpoint, name.partition(",sparsity=")[0])
            encoder = Encoder.of(model, checkpoint.tokenizer(), threads=threads)
            return {"texts_per_s": _text_rate(encoder)}

        return f"{recipe.format} {recipe.method == 'smooth'}", measure

    return _fill(path, speed, threads, command, new)


def _fill(
    path: Path,
    speed: Callable[[str], tuple[str, Callable[[], dict[str, Any]]]],
    threads: int,
    command: str,
    new: bool,
) -> Path:
    """speed(row) is what rows that are as fast have in common, and what measures one of them."""
    record = json.loads(path.read_text(encoding="utf-8"))
    known: dict[str, dict[str, Any]] = {}
    for row in record["result"]["rows"] if new else ():
        rates = {name: row[name] for name in _RATES if name in row}
        if rates:
            known[speed(row["row"])[0]] = rates
    for row in record["result"]["rows"]:
        key, measure = speed(row["row"])
        if key not in known:
            known[key] = measure()
            print(row["row"], known[key], flush=True)
        for name in _RATES:
            row.pop(name, None)
        row.update(known[key])
    if not new or "speed" not in record["result"]:
        about = {"threads": threads, "command": command, "commit": commit_of(ROOT)}
        record["result"]["speed"] = measured_here("flatout", "numpy") | about
    write_record(path, record)
    return path


def _decoder_speed(source: Checkpoint, recipe: Recipe, threads: int) -> dict[str, Any]:
    try:
        check_formats(recipe)
    except ConfigError as error:
        return {"no_speed": error.rule}
    return decoder_rates(compress(source, recipe), threads)


def decoder_rates(model: Model, threads: int) -> dict[str, Any]:
    """Medians in tokens a second, of one sequence."""
    runner = CpuRunner(model, threads=threads, num_pages=_PROMPT // 64 + 1)
    pages = np.arange(runner.num_pages, dtype=np.int32)[None, :]
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab_size, _PROMPT).astype(np.int32)

    def seconds(start: int, count: int) -> float:
        where = np.array([start], np.int32), np.array([count], np.int32)
        begun = time.perf_counter()
        runner.forward(StepInput(tokens[start : start + count], *where, pages), "last")
        return time.perf_counter() - begun

    prompts = [seconds(0, _PROMPT) for _ in range(_TRIES + 1)][1:]  # the first one warms up
    steps = [seconds(at, 1) for at in range(_CONTEXT - 8, _CONTEXT + _STEPS)][8:]
    return {
        "decode_tokens_per_s": 1 / statistics.median(steps),
        "prefill_tokens_per_s": _PROMPT / statistics.median(prompts),
    }


def _text_rate(encoder: Encoder) -> float:
    tokens = np.random.default_rng(0).integers(0, encoder.spec.vocab_size, _TEXT_TOKENS).astype(np.int32)
    spent = []
    for _ in range(_TEXTS + 20):
        begun = time.perf_counter()
        encoder.pooled(tokens, np.zeros(1, np.int64))
        spent.append(time.perf_counter() - begun)
    return 1 / statistics.median(spent[20:])
