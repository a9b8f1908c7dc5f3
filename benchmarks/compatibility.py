"""Test which programs load an artifact of each format and write docs/compatibility.md from what happened.

    python benchmarks/compatibility.py # write the page and benchmarks/results/compatibility_any_DATE.json
    python benchmarks/compatibility.py --check # fail if the page no longer says what happens

For every format a small random model is saved, loaded by transformers with compressed-tensors, and its
logits are compared with the exact ones of the dequantised weights. Loading must succeed exactly where
flatout.json's "loads_in" says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.tiny import tiny_model, tiny_spec, write_tokenizer  # noqa: E402

from flatout.core.artifact import load_artifact, save_artifact  # noqa: E402
from flatout.core.formats import Recipe, uniform  # noqa: E402
from flatout.core.tokenizer import Tokenizer  # noqa: E402
from flatout.errors import ConfigError  # noqa: E402
from flatout.models.llama import Llama  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
FORMATS = [
    "fp32",
    "bf16",
    "w8a8",
    "w8a8-g64",
    "w8a8-g64-asym",
    "w8a16",
    "w8a16-g32-asym",
    "w4a8-g32",
    "w4a8-g64",
    "w4a8-g64-asym",
    "w4a16-g32",
    "w4a16-g64",
    "w4a16-g128",
    "w4a16-g32-asym",
    "q4_0",
    "q4_1",
    "q8_0",
]
PACKAGES = ("transformers", "compressed-tensors", "torch")

INTRODUCTION = """\
# Compatibility

What loads the folder that `flatout optimize` writes. The table is the output of
`python benchmarks/compatibility.py`, which saves a small random model in every format, loads it and compares
logits; it was last run with {versions}.

- **Stored**: the compressed-tensors form in `model.safetensors`. Int-quantized takes a byte a weight,
  pack-quantized 4 bits where the format has 4. Asymmetric 4-bit weights take a byte each, because
  transformers 5 does not load packed zero points.
- **transformers**: `AutoModelForCausalLM.from_pretrained(folder)`, nothing else.
- **Difference**: norm of the difference between the logits that transformers computes in float32 and those
  of the dequantised weights, over the norm of the latter. Formats with int8 activations (`a8`, `q`) round
  activations there as they do here, by slightly different rules (steps of amax / 127.5 there, amax / 127
  here); activations of the other formats stay floats there.

The KV-cache format is not part of the folder's weights: transformers uses its own cache. A recipe that gives
layers different formats loads as well, unless one of them is `q4_1`.

"""

CLOSING = """
`q4_1` has a float minimum a block, which compressed-tensors cannot say. Such a folder stores an extra tensor
`weight_minimum` and an argument that other programs do not accept, so that they refuse it instead of
computing something else. Programs not named here were not tested.
"""


def try_format(name: str, folder: Path) -> dict[str, Any]:
    """What happens to an artifact whose linears, embedding and head are all in format `name`."""
    import torch
    from transformers import AutoModelForCausalLM

    recipe: Recipe = uniform(name, head=name)
    model = tiny_model(tiny_spec("llama", hidden_size=128, head_dim=32, intermediate_size=256), recipe)
    folder.mkdir()
    write_tokenizer(folder, model.spec.vocab_size)
    artifact = save_artifact(model, Tokenizer.from_folder(folder), folder / "artifact", {})
    tokens = [(7 * i * i + 3) % 320 for i in range(40)]
    exact = Llama(load_artifact(artifact)[0]).forward(tokens)
    config = json.loads((artifact / "config.json").read_text()).get("quantization_config", {})
    stored = sorted({group["format"] for group in config.get("config_groups", {}).values()})
    row: dict[str, Any] = {
        "format": name,
        "stored": " and ".join(stored) if stored else "plain floats",
        "said": json.loads((artifact / "flatout.json").read_text())["loads_in"]["transformers"],
    }
    try:
        other = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = other(torch.tensor([tokens])).logits[0]
        row |= {"loads": True, "difference": float((logits - exact).norm() / exact.norm())}
    except ValueError as error:
        row |= {"loads": False, "error": str(error).splitlines()[0]}
    return row


def render(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The page. Differences are rounded to one digit, so that it does not change with the machine."""
    lines = ["| format | stored | flatout | transformers | difference |", "|---|---|---|---|---|"]
    for row in rows:
        loads = "yes" if row["loads"] else "no"
        difference = f"{row['difference']:.0e}" if row.get("difference", 0) > 1e-5 else "< 1e-05"
        shown = difference if row["loads"] else "-"
        lines.append(f"| `{row['format']}` | {row['stored']} | yes | {loads} | {shown} |")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    # What this package reads is written by hand and stays.
    _, mark, by_hand = PAGE.read_text().partition("\n## What is read")
    return INTRODUCTION.format(versions=named) + "\n".join(lines) + "\n" + CLOSING + mark + by_hand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [try_format(name, Path(folder) / name) for name in FORMATS]
    wrong = [row["format"] for row in rows if row["loads"] != (row["said"] == "yes")]
    if wrong:
        raise ConfigError(
            'flatout.json\'s "loads_in" must say what happens', ", ".join(wrong), "core/artifact.py"
        )
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    page = render(rows, versions)
    if options.check:
        if PAGE.read_text() != page:
            sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run python benchmarks/compatibility.py")
        return
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    today = datetime.date.today().isoformat()
    result = {
        "command": "python benchmarks/compatibility.py",
        "commit": commit,
        "date": today,
        "versions": versions,
        "rows": rows,
    }
    results = ROOT / "benchmarks" / "results" / f"compatibility_any_{today}.json"
    results.write_text(json.dumps(result, indent=2) + "\n")
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
