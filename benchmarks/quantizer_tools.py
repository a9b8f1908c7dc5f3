"""Round a Hugging Face folder with a public tool; run by benchmarks/quantizers.py in a process of its own,
with the tool's packages on PYTHONPATH.

    python benchmarks/quantizer_tools.py TOOL FOLDER TOKENS.npy OUT.npz --bits 4 --group 64 [--iters 200]

TOOL: gptq or awq (llm-compressor) or autoround. TOKENS.npy: calibration token ids, int64 (rows, length).
OUT.npz: the rounded linears as floats, by Hugging Face name. Each tool runs with its own defaults otherwise:
asymmetric codes, a scale a group, linears only.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


def llm_compressor(tool: str, model: Any, tokens: np.ndarray, bits: int, group: int) -> None:
    """GPTQModifier or AWQModifier; weights are left as the integers mean them."""
    from compressed_tensors.quantization import forward_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rounding = (GPTQModifier if tool == "gptq" else QuantizationModifier)(
        config_groups=groups, ignore=["lm_head"]
    )
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        for row in torch.from_numpy(tokens)
    ]
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=None),  # type: ignore[arg-type]
        recipe=[rounding] if tool == "gptq" else [AWQModifier(), rounding],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            module.weight.data = forward_quantize(module, module.weight.data, "weight", scheme.weights)


def autoround(
    model: Any, folder: Path, tokens: np.ndarray, bits: int, group: int, iterations: int, batch: int
) -> Any:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=group,
        sym=False,
        iters=iterations,
        batch_size=batch,
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        dataset=[torch.from_numpy(row)[None] for row in tokens],
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    found = tool.quantize()
    return found[0] if isinstance(found, tuple) else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tool", choices=["gptq", "awq", "autoround"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():  # llm-compressor pins memory whether or not there is an accelerator
        torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[assignment,method-assign]
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    tokens = np.load(args.tokens)
    start, cpu = time.perf_counter(), time.process_time()
    if args.tool == "autoround":
        model = autoround(model, args.folder, tokens, args.bits, args.group, args.iters, args.batch)
    else:
        llm_compressor(args.tool, model, tokens, args.bits, args.group)
    spent = [time.perf_counter() - start, time.process_time() - cpu]
    weights = {
        name: tensor.detach().float().cpu().numpy()
        for name, tensor in model.named_parameters()
        if name.startswith("model.") and "_scale" not in name and "_zero_point" not in name
    }
    np.savez(args.out, seconds=np.array(spent), **weights)


if __name__ == "__main__":
    main()
