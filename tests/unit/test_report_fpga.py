"""The page of `flatout fpga --report`: what it says follows from the result."""

from __future__ import annotations

from typing import Any

from flatout.report.fpga import UNUSED, cycles_by_part, render, short, why_not


def fitted(board: str, needed: int, share: float) -> dict[str, Any]:
    resource = {"name": "flip-flops", "needed": needed, "available": 1000, "usable": 500}
    reasons = [f"flip-flops: {needed} needed, 500 of 1,000 usable"] if needed > 500 else []
    return {
        "board": board, "device": "<K26>", "source": "a table", "resources": [resource], "fits": not reasons,
        "why_not": reasons, "bandwidth_share": share, "tier": "counted from the structure, not synthesised",
    }  # fmt: skip


def result(**changes: Any) -> dict[str, Any]:
    step = {
        "context": 512, "tokens": 1, "cycles": 1000, "predicted_cycles": 1010, "bytes_read": 1_234_567,
        "mbu": 0.93, "cycles_by_kind": {"qkv": 500, "o": 100, "attention": 300, "norm": 50},
    }  # fmt: skip
    boards = [fitted("kv260", 300, 1.0), fitted("u280", 300, 0.04)]
    found: dict[str, Any] = {
        "board": "kv260", "recipe": "w4a8-g64", "fit": boards[0], "boards": boards, "synthesis": None,
        "bit_exact": True, "differences": 0, "tokens": 64, "logits_sha256": "ab" * 32, "perplexity": 12.5,
        "specification_perplexity": 12.5, "accuracy": None, "cycles_per_token": 1000, "mbu": 0.93,
        "decode": step, "together": step | {"tokens": 4, "cycles": 1100}, "speculative": None,
        "speed": [{"clock_mhz": 300, "tokens_per_s": 197.2, "joules_per_token": [0.025, 0.041]}],
    }  # fmt: skip
    return found | changes


def test_the_page_says_what_was_found() -> None:
    page = render("a<b", result())
    assert "a&lt;b on kv260" in page
    assert "&lt;K26&gt;" in page
    assert "computes every logit, key and value of 64 tokens exactly as specified" in page
    assert "197 tokens/s, 25 to 41 mJ each" in page
    assert "3.64x" in page  # four tokens in 1100 cycles
    assert "It has not run on any FPGA" in page


def test_the_page_does_not_hide_what_is_wrong() -> None:
    boards = [fitted("kv260", 700, 1.0)]
    page = render("m", result(bit_exact=False, differences=7, fit=boards[0], boards=boards))
    assert "7 numbers of the simulated accelerator differ" in page
    assert "the design does not fit the board" in page
    assert "flip-flops: 700 needed, 500 of 1,000 usable" in page
    guessed = {"tokens": [1, 2], "passes": 1, "guesses": 3, "accepted": 1, "gain": 1.9, "identical": False}
    assert "OTHER tokens" in render("m", result(speculative=guessed))


def test_the_page_says_what_the_integers_lose() -> None:
    lost = {"perplexity_original": 12.25, "nats": 0.0202, "standard_error": 0.01}
    page = render("m", result(accuracy=lost))
    assert "12.250000" in page
    assert "+0.0202 ± 0.0100 nats a token" in page
    assert "not measured here" not in page
    assert "not measured here: the artifact&#39;s certificate" in render("m", result()).replace("'", "&#39;")


def test_parts_add_up_to_the_whole() -> None:
    parts = cycles_by_part(result()["decode"])
    assert parts == [("linears", 600), ("attention", 300), ("norms", 50), ("between instructions", 50)]


def test_unused_bandwidth_is_a_reason() -> None:
    assert why_not(result()) == [("u280", UNUSED)]
    boards = [fitted("a", 700, 0.04), fitted("b", 300, 0.06), fitted("c", 700, 1.0)]
    too_many = "flip-flops: 700 needed, 500 of 1,000 usable"
    assert why_not(result(boards=boards)) == [("a, c", too_many), ("a, b", UNUSED)]


def test_numbers_are_shortened() -> None:
    assert [short(n) for n in (12, 1234, 91_775_360)] == ["12", "1.23 k", "91.8 M"]
