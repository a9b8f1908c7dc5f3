"""Every compression method on one page: size, perplexity, divergence, decode speed and minutes.

    python benchmarks/methods.py [MODEL] --text FILE [--calibration FILE] [--rows NAMES] [--others]
    python benchmarks/methods.py [MODEL] --speed          tokens a second of these rows, on a quiet machine
    python benchmarks/methods.py --table                  the tables of docs/methods.md, from the files

MODEL: a decoder, or an encoder, whose quality is the cosine of its vectors with the original's. --text: what
judges, UTF-8, cut into windows of 1,024 tokens evenly spaced; the shipped validation passages by default.
--calibration: what calibrates, in windows of 512; the shipped calibration passages by default. Rows join the
newest results file of MODEL where that was judged by the same text. --speed makes no rows, it times those of
that file (benchmarks/methods_speed.py): a machine that must be quiet need not be the one that rounds.

A row is a recipe in the grammar of `--recipe`, one line of ROWS. Perplexity and divergence are those of the
weights: dequantised, on the bf16 engine, the same for all rows and for other programs' weights (--others, and
--tools FOLDER where pip has installed auto-round and llmcompressor: benchmarks/quantizers.py); a cache format
that the engine does not have is judged by the reference runner, the original too. Bits a weight count what a
packed file needs: codes, scales, zeros. Every finished row is kept under build/methods, so that an
interrupted run goes on, and a changed row alone is made again; --jobs makes several at a time. --cost:
minutes and peak memory of the rows alone, nothing judged or kept.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatout.compress.apply import apply
from flatout.compress.method import data_of
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.encoder import EncoderModel
from flatout.core.encoder_folder import is_encoder, open_encoder
from flatout.core.files import write_bytes
from flatout.core.formats import Recipe, parse_format
from flatout.core.fuse import assemble, float_recipe
from flatout.core.model import Model, dense, expected_weights
from flatout.core.sparsity import parse_sparsity
from flatout.data.passages import load_passages
from flatout.engine.cpu import CpuRunner
from flatout.engine.encoder import Encoder
from flatout.engine.reference import ReferenceRunner
from flatout.engine.runner import Runner
from flatout.engine.score import score_documents
from flatout.hardware.detect import detect
from flatout.models.bert import Bert
from flatout.search.encoder_recipes import encoder_from_name
from flatout.search.recipes import recipe_from_name
from flatout.verify.quality import Cluster, divergence
from flatout.verify.vectors import compare, pieces_of
from methods_page import fill_page, newest, write_record
from methods_speed import add_encoder_speeds, add_speeds
from record import measured_here, write

FOUR, THREE = "w4a16-g64-asym", "w3a16-g64-asym"
LOW = ("rtn", "awq", "rotate", "gptq", "awq-gptq", "rotate-gptq", "tune")
ROWS = (
    "bf16",
    "w8a16",
    "w8a8/smooth",
    "w8a8-g64",
    *(f"{FOUR}/{method}" for method in LOW),
    *(f"{THREE}/{method}" for method in LOW),
    "w5a16-g64/gptq",
    f"{FOUR}/gptq,head=w4a16-g64-asym,embedding=w4a16-g64-asym",
    "bf16,kv=int8",
    "bf16,kv=int4",
    *(f"bf16,sparsity={method}-{share}" for share in ("50%", "2:4")
      for method in ("magnitude", "wanda", "sparsegpt")),
)  # fmt: skip
ENCODER_ROWS = (
    "bf16", "w8a8", "w8a16", "w8a8-g128", "w8a8-g64", "w8a8-g32", "w8a8/gptq", "w8a8/smooth",
    "w8a8/smooth,layers.*.down=w8a8-g128",
    *(f"{fmt}{method}" for fmt in ("w4a16-g32", "w4a16-g64-asym", "w4a16-g32-asym")
      for method in ("", "/gptq")),
    *(f"bf16,sparsity={method}-{share}" for share in ("50%", "2:4")
      for method in ("magnitude", "wanda", "sparsegpt")),
)  # fmt: skip
KEPT = Path(__file__).resolve().parent.parent / "build" / "methods"
WINDOW, CALIBRATED = 1024, 512


def windows(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens, evenly spaced."""
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return [list(tokens[start : start + length]) for start in starts]


def read(tokenizer: Any, path: Path | None, split: str) -> list[int]:
    text = path.read_text(encoding="utf-8") if path else "\n\n".join(p.text for p in load_passages(split))
    return list(tokenizer.encode(text))


def bits_per_weight(model: Model) -> float:
    """Of the layers' linears, packed: codes, 16-bit scales, zeros of as many bits as codes; of n:m, the
    weights that stay and a bit mask (core/sparse.py)."""
    sparsity = parse_sparsity(model.recipe.sparsity) if model.recipe.sparsity else None
    kept, mask = (sparsity.kept / sparsity.of, 1) if sparsity is not None and sparsity.of else (1.0, 0)
    bits = weights = 0.0
    for name, shape, fmt in expected_weights(model.spec, model.recipe):
        if len(shape) == 2 and name.startswith("layers."):
            n, k = shape
            each = 16 + (fmt.bits if fmt.zero == "asymmetric" else 0) if fmt.is_integer else 0
            bits += n * k * (fmt.bits * kept + mask) + n * fmt.groups(k) * each
            weights += n * k
    return bits / weights


class Judge:
    """Scores weights on the bf16 engine, or the reference runner, against the original's there."""

    def __init__(
        self, source: Checkpoint, text: list[int], count: int, threads: int, reference: bool = False
    ) -> None:
        self._source, self._threads, self._reference = source, threads, reference
        self._windows = windows(text, count, WINDOW)
        self._original = self.runner(assemble(source, float_recipe("bf16")))
        kept = kept_file(".npy", source.sha256, reference, self._windows)
        if not kept.exists():
            scores = np.concatenate(score_documents(self._original, self._windows))
            KEPT.mkdir(parents=True, exist_ok=True)
            write_bytes(kept, _npy(scores.astype(np.float64)))
        self._scores: np.ndarray = np.load(kept)

    def runner(self, model: Model) -> Runner:
        """`model` with its weights as floats; rows of float weights keep the recipe's cache."""
        recipe = float_recipe("bf16", model.recipe.kv_cache if _is_float(model) else "bf16")
        floats = {name: dense(weight) for name, weight in model.weights.items()}
        whole = Model(spec=model.spec, recipe=recipe, weights=floats)
        if self._reference:
            return ReferenceRunner(whole, num_pages=2 * WINDOW // 64)
        return CpuRunner(whole, threads=self._threads, num_pages=2 * WINDOW // 64)

    def row(self, model: Model) -> dict[str, float]:
        runner = self.runner(model)
        scores = np.concatenate(score_documents(runner, self._windows)).astype(np.float64)
        lost = self._scores - scores
        clusters = [Cluster(id=str(i), domain="", tokens=tuple(w)) for i, w in enumerate(self._windows)]
        differs = divergence(self._original, runner, clusters, 1024)
        per_window = lost.reshape(len(self._windows), -1).mean(axis=1)
        return {
            "perplexity": float(np.exp(-scores.mean())),
            "loss": float(np.expm1(lost.mean())),
            "loss_error": float(per_window.std(ddof=1) / len(per_window) ** 0.5),
            "kl": differs.mean_kl,
            "flips": differs.flip_rate,
            "tokens": len(scores),
        }


def kept_file(suffix: str, *made_from: Any) -> Path:
    """Where what was `made_from` these is kept."""
    return KEPT / f"{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]}{suffix}"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _is_float(model: Model) -> bool:
    return not parse_format(model.recipe.layers).is_integer


def decoder_row(
    name: str, source: Checkpoint, calibration: list[list[int]], device: str
) -> tuple[dict[str, Any], Model]:
    """What making the row took, and the model."""
    recipe = row_recipe(name, source)
    start = time.process_time()
    clock = time.perf_counter()
    model, report = apply(source, data_of(calibration, device=device), recipe)
    found: dict[str, Any] = {
        "row": name,
        "machine": detect().name,
        "device": device,
        "bits_per_weight": bits_per_weight(model),
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - start,
        "calibration_tokens": report.tokens,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
    }
    return found, model


def row_recipe(name: str, source: Checkpoint) -> Recipe:
    """Embedding and head stay bf16 unless the row names them: the rows compare what becomes of the layers."""
    if name.endswith(",kv=int4"):  # which the engine that names are checked against does not have
        return replace(row_recipe(name.removesuffix(",kv=int4"), source), name=name, kv_cache="int4")
    recipe = recipe_from_name(name, source)
    if "head=" not in name:
        recipe = replace(recipe, embedding="bf16", head="bf16")
    return recipe if "kv=" in name else replace(recipe, kv_cache="bf16")


def encoder_bits(name: str, encoder: EncoderModel) -> float:
    """As bits_per_weight, of all linears."""
    sparsity = name.partition(",sparsity=")[2]
    if sparsity and (pattern := parse_sparsity(sparsity)).of:
        return parse_format(encoder.formats.usual).bits * pattern.kept / pattern.of + 1
    size = weights = 0
    for i in range(encoder.spec.num_layers):
        for kind, (n, k) in encoder.spec.linears().items():
            size += encoder.formats.of(i, kind).weight_bytes(n, k)
            weights += n * k
    return size * 8 / weights


def encoder_rows(model: str, names: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """Each recipe beside the float32 original on pieces of the validation passages: cosine of their vectors,
    and the task of verify/vectors.py. gptq and pruning are calibrated on the shipped passages."""
    checkpoint = open_encoder(model)
    tokenizer = checkpoint.tokenizer()
    pieces = pieces_of(load_passages("validation"))

    def vectors(encoder: Encoder) -> np.ndarray:
        return encoder.encode([text for _, text in pieces])

    how = {"pooling": checkpoint.pooling, "normalize": True}
    original, found = vectors(Encoder(Bert(encoder_from_name(checkpoint, "fp32")), tokenizer, **how)), []
    for name in names:
        start, clock = time.process_time(), time.perf_counter()
        encoder = encoder_from_name(checkpoint, name)
        spent = {"cpu_seconds": time.process_time() - start, "seconds": time.perf_counter() - clock}
        fast = Encoder.of(encoder, tokenizer, threads=threads, **how)
        own = vectors(fast)
        cosine = (own * original).sum(axis=1)
        _, before, after = compare(pieces, original, own)
        found.append({
            "row": name, "machine": detect().name,
            "bits_per_weight": encoder_bits(name, encoder),
            "cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min()),
            "accuracy": float(after.mean()), "accuracy_original": float(before.mean()), **spent,
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def spread(names: Sequence[str], jobs: int, seconds: float | None) -> None:
    """Make the rows `names`, the first one before all others, which need what it keeps, by `jobs` processes
    of this command, until `seconds` have passed."""
    own = [sys.executable, *sys.argv]
    for option in ("--jobs", "--rows", "--seconds"):
        if option in own:
            del own[own.index(option) : own.index(option) + 2]
    start = time.perf_counter()

    def make(name: str) -> None:
        left = None if seconds is None else max(0.1, seconds - (time.perf_counter() - start))
        try:
            done = subprocess.run(
                [*own, "--rows", name, "--only-keep"],
                timeout=left,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return
        print(done.stdout.strip() if done.returncode == 0 else f"{name}: {done.stderr}", flush=True)

    make(names[0])
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, names[1:]))


def keep(short: str, result: dict[str, Any], command: str) -> Path:
    """Write the results file of model `short`. Rows that its newest file has of the same text stay unless
    they were made again; those that join it say by which command."""
    path = newest(short)
    record = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    if path is None or record is None or record["result"]["judged"] != result["judged"]:
        return write(f"methods_{short}", result, command=command)
    made = {row["row"]: row | {"command": command, "date": result["date"]} for row in result["rows"]}
    rows = {row["row"]: row for row in record["result"]["rows"]} | made
    listed = ENCODER_ROWS if "cosine_mean" in result["rows"][0] else ROWS
    order = {name: place for place, name in enumerate(listed)}
    record["result"]["rows"] = sorted(rows.values(), key=lambda row: order.get(row["row"], len(order)))
    write_record(path, record)
    return path


def time_rows(short: str, model: str, threads: int, command: str, new: bool) -> int:
    """Put how fast they run here into the rows of the newest results file of `short`, or only into those that
    lack it; the exit code."""
    path = newest(short)
    if path is None:
        print(f"benchmarks/results has no rows of {short}: make them first, without --speed", file=sys.stderr)
        return 2
    if is_encoder(model):
        print(add_encoder_speeds(path, model, threads, command, new))
        return 0
    source = open_checkpoint(model)
    print(add_speeds(path, source, lambda name: row_recipe(name, source), threads, command, new))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--rows", help="recipes, separated by spaces; default: all of ROWS")
    parser.add_argument("--windows", type=int, default=32, help="of 1,024 tokens, that judge")
    parser.add_argument("--calibrated", type=int, default=32, help="windows of 512 tokens that calibrate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--others", action="store_true", help="also what other programs make of MODEL")
    parser.add_argument("--tools", type=Path, help="folder of pip install --target with public quantisers")
    parser.add_argument("--tool-rows", default="", help="of them, such as gptq-4 autoround-3; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where gptq and tune compute")
    parser.add_argument("--jobs", type=int, default=0, help="rows at a time, each in a process of its own")
    parser.add_argument("--seconds", type=float, help="with --jobs: what is not done by then is left out")
    parser.add_argument("--only-keep", action="store_true", help="write no results file")
    parser.add_argument("--finished", action="store_true", help="only the rows that are kept already")
    parser.add_argument("--speed", action="store_true", help="time the rows of the newest results file")
    parser.add_argument("--new", action="store_true", help="with --speed: only rows that have no speed yet")
    parser.add_argument("--cost", action="store_true", help="minutes and memory of the rows alone")
    parser.add_argument("--table", action="store_true", help="fill docs/methods.md")
    args = parser.parse_args()
    if args.table:
        fill_page()
        return 0
    command = shlex.join(["python", "benchmarks/methods.py", *sys.argv[1:]])
    torch.set_num_threads(args.threads)
    short = Path(args.model).name
    if args.speed:
        return time_rows(short, args.model, args.threads, command, args.new)
    if is_encoder(args.model):
        names = args.rows.split() if args.rows else ENCODER_ROWS
        result: dict[str, Any] = {"rows": encoder_rows(args.model, names, args.threads)}
        result |= {"model": short, "judged": "pieces of the validation passages, float32 original"}
        print(keep(short, measured_here("torch") | result, command))
        return 0
    source = open_checkpoint(args.model)
    text, calibration = (
        read(source.tokenizer, path, split)
        for path, split in ((args.text, "validation"), (args.calibration, "calibration"))
    )
    calibrating = windows(calibration, args.calibrated, CALIBRATED)
    names = args.rows.split() if args.rows else ROWS
    if args.jobs:
        spread(names, args.jobs, args.seconds)
    judges: dict[bool, Judge] = {}

    def judge(model: Model, reference: bool = False) -> dict[str, float]:
        if reference not in judges:
            judges[reference] = Judge(source, text, args.windows, args.threads, reference)
        return judges[reference].row(model)

    rows = []
    for name in names:
        if args.cost:
            print(decoder_row(name, source, calibrating, args.device)[0], flush=True)
            continue
        judged = windows(text, args.windows, WINDOW)
        kept = kept_file(".json", source.sha256, name, args.windows, calibrating, judged)
        if not kept.exists() and (args.jobs or args.finished):
            print(f"{name} is missing", flush=True)
            continue
        if not kept.exists():
            found, model = decoder_row(name, source, calibrating, args.device)
            found |= judge(model, reference="kv=int4" in name)
            KEPT.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
        print(rows[-1], flush=True)
    if args.cost or args.only_keep:
        return 0
    if args.others or args.tools:
        from quantizers import other_rows, tool_rows

        if args.tools:
            chosen = args.tool_rows.split()
            rows += tool_rows(source, calibrating, judge, args.tools, args.threads, KEPT, chosen)
        rows += other_rows(source, judge, args.threads, KEPT) if args.others else []
    result = {"rows": rows, "model": short, "judged": f"{args.windows} windows of {WINDOW} tokens of "
              f"{args.text.name if args.text else 'the shipped validation passages'}, calibrated on "
              f"{args.calibrated * CALIBRATED:,} of "
              f"{args.calibration.name if args.calibration else 'the shipped ones'}"}  # fmt: skip
    print(keep(short, measured_here("torch") | result, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
