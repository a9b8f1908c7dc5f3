"""Tokens a second with and without speculation, interleaved, on text that repeats and on text that does not.

    python benchmarks/speculate.py [MODEL] [--draft MODEL] [--batch N] [--seconds S] [--write]

Three tasks over the shipped validation passages: `copy` (the chat asks to repeat a passage word for word),
`continue` (a passage goes on, greedy) and `sampled` (the same at temperature 0.8). Each side answers all
prompts of a task, `--batch` at a time, to the same number of tokens; the time is that of all answers, the
little of the prompts that cached pages do not hold included. The tokens of both sides must be the same.
With --draft, that model guesses as well where it pays. Prints a table; --write keeps it in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
import time

from flatout.data.passages import load_passages
from flatout.engine.engine import Engine
from flatout.engine.load import load
from flatout.engine.request import SamplingParams
from flatout.engine.speculate import CostlyProposer, NgramProposer, Speculator
from flatout.verify.speed import ab_test
from record import measured_here, write

TASKS = ("copy", "continue", "sampled")
PROMPT_TOKENS = 160


def prompts_of(task: str, engine: Engine, count: int) -> list[list[int]]:
    """`count` prompts as token ids, each from another book."""
    books = {passage.book: passage.text for passage in load_passages("validation")}
    texts = sorted(books.values())[:count]
    passages = [engine.tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    if task != "copy":
        return passages
    asked = [text[: len(text) // 3] for text in texts]
    wish = "Repeat the following text word for word.\n\n"
    return [engine.chat_prompt([{"role": "user", "content": wish + text}]) for text in asked]


def measure(
    engine: Engine,
    draft: CostlyProposer | None,
    task: str,
    prompts: list[list[int]],
    batch: int,
    tokens: int,
    seconds: float,
) -> dict[str, object]:
    """One row of the table. Raises SystemExit when speculation changes a token."""
    heat = 0.8 if task == "sampled" else 0.0
    params = SamplingParams(max_tokens=tokens, temperature=heat, ignore_eos=True)
    answers: dict[bool, list[list[int]]] = {}

    def run(speculate: bool) -> float:
        engine.speculator = Speculator(NgramProposer(), draft) if speculate else None
        begin = time.perf_counter()
        results = []
        for first in range(0, len(prompts), batch):
            results += engine.generate(prompts[first : first + batch], params)
        answers[speculate] = [result.token_ids for result in results]
        return time.perf_counter() - begin

    result = ab_test(lambda: run(False), lambda: run(True), max_seconds=seconds, min_pairs=6)
    if answers[False] != answers[True]:
        raise SystemExit(f"{task}: speculation changed the answer")
    before = engine.stats()
    run(True)
    after = engine.stats()
    total = tokens * len(prompts)
    return {
        "task": task,
        "batch": batch,
        "tokens_per_s_plain": total / result.seconds_a.median,
        "tokens_per_s": total / result.seconds_b.median,
        "ratio": result.ratio,
        "low": result.low,
        "high": result.high,
        "pairs": result.pairs,
        "kept_noisy": result.kept_noisy,
        "steps_a_token": (after.steps - before.steps) * batch / total,
        "proposed": after.tokens_drafted - before.tokens_drafted,
        "accepted": after.tokens_accepted - before.tokens_accepted,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--draft", metavar="MODEL", help="a cheaper model that guesses as well")
    parser.add_argument("--batch", type=int, action="append", help="sequences at a time; may be repeated")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--prompts", type=int, default=8, help="of each task")
    parser.add_argument("--seconds", type=float, default=60, help="of each comparison")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    engine = load(args.model, runner="cpu", draft=args.draft, speculate="draft" if args.draft else "ngram")
    draft = engine.speculator.draft
    rows = []
    print("| task | batch | plain tokens/s | tokens/s | ratio | guessed | right | steps a token |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for task in args.task or TASKS:
        prompts = prompts_of(task, engine, args.prompts)
        for batch in args.batch or [1]:
            row = measure(engine, draft, task, prompts, batch, args.tokens, args.seconds)
            rows.append(row)
            print(
                "| {task} | {batch} | {tokens_per_s_plain:.0f} | {tokens_per_s:.0f} | {ratio:.2f} "
                "({low:.2f} to {high:.2f}) | {proposed} | {accepted} | {steps_a_token:.2f} |".format(**row),
                flush=True,
            )
    if args.write:
        result = {
            **measured_here("numpy"),
            "model": args.model,
            "draft": args.draft,
            "runner": engine.runner.name,
            "rows": rows,
        }
        write("speculate", result, " ".join(["python benchmarks/speculate.py", *sys.argv[1:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
