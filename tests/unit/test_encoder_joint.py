"""Mixed formats of an encoder: their grammar, what smoothing is for, and the choice against all there is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.encoders import WORDS, packed, tiny_encoder_folder, tiny_encoder_spec

from flatout.compress.encoder import compress_encoder, load
from flatout.compress.encoder_smooth import smooth_encoder, smoothing_factors
from flatout.core.encoder import EncoderFormats, EncoderModel, parse_encoder_formats
from flatout.core.encoder_folder import EncoderCheckpoint, open_encoder, save_encoder
from flatout.core.quantized import QuantizedTensor
from flatout.core.safetensors import write_safetensors
from flatout.engine.encoder import CpuEncoder, Encoder
from flatout.errors import ConfigError, ModelFileError
from flatout.models.bert import Bert
from flatout.search.encoder_joint import _SLOWER, SPACE, Mixtures, Tables, measure, propose
from flatout.search.encoder_recipes import encoder_from_name, parse_encoder_recipe
from flatout.search.solve import Choice

SPEC = tiny_encoder_spec(hidden_size=128, intermediate_size=256)
TEXTS = [[2, *((7 * i * j + 3) % 300 for j in range(40)), 3] for i in range(1, 9)]


@pytest.fixture
def loud(tmp_path: Path) -> EncoderCheckpoint:
    """An encoder, one channel of whose norms is thirty times as loud as the others."""
    folder = tiny_encoder_folder(tmp_path / "m", SPEC)
    source = open_encoder(folder)
    tensors = {name: source.tensors.float32(name) for name in source.tensors.names}
    for name, values in tensors.items():
        if name.endswith("LayerNorm.weight"):
            values[5] *= 30
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", tensors)
    return open_encoder(folder)


def states(model: EncoderModel, as_served: bool) -> torch.Tensor:
    bert = Bert(model, as_served=as_served)
    with torch.no_grad():
        return torch.cat([bert.hidden(torch.tensor(ids)) for ids in TEXTS])


def error(source: EncoderCheckpoint, model: EncoderModel) -> float:
    exact = states(compress_encoder(source, "fp32"), False)
    return float((states(model, True) - exact).square().mean())


def test_smoothing_takes_most_of_what_a_loud_channel_costs(loud: EncoderCheckpoint) -> None:
    factors = smoothing_factors(loud, TEXTS)
    assert error(loud, smooth_encoder(loud, "w8a8", factors)) < 0.4 * error(
        loud, compress_encoder(loud, "w8a8")
    )
    for values in factors.values():
        assert values[5] == values.min()  # the loud one is turned down


def test_smoothing_is_for_formats_that_share_a_scale(loud: EncoderCheckpoint) -> None:
    factors = smoothing_factors(loud, TEXTS)
    mixed = smooth_encoder(loud, "w8a8-g32,layers.1.qkv=w8a8", factors)
    assert list(mixed.factors) == ["layers.1.qkv"]
    nearest = compress_encoder(loud, "w8a8-g32").weights["layers.0.qkv"]
    own = mixed.weights["layers.0.qkv"]
    assert isinstance(own, QuantizedTensor)
    assert isinstance(nearest, QuantizedTensor)
    np.testing.assert_array_equal(own.codes, nearest.codes)
    with pytest.raises(ConfigError, match="smoothing is for int8 activations that share one scale a token"):
        smooth_encoder(loud, "w8a8-g32", factors)


def test_every_instruction_set_multiplies_by_the_factors(tmp_path: Path) -> None:
    """The same bits everywhere, near the specification, which leaves queries and attention weights alone."""
    from flatout import _cpu

    source = open_encoder(tiny_encoder_folder(tmp_path / "m", SPEC))
    rng = np.random.default_rng(0)
    factors = {
        f"layers.{i}.{kind}": np.exp(0.2 * rng.standard_normal(k)).astype(np.float32)
        for kind, (_, k) in SPEC.linears().items()
        for i in range(SPEC.num_layers)
    }
    model = smooth_encoder(source, "w8a8,layers.0.down=w8a8-g32,layers.1.o=w8a16", factors)
    assert len(model.factors) == 6  # given ones are taken for any linear
    tokens, starts = packed(SPEC, [1, 17, 64, 130, 300, 3])
    expected = CpuEncoder(model, 1, "portable").forward(tokens, starts, "none", False)
    for isa in _cpu.isas():
        for threads in (1, 3):
            got = CpuEncoder(model, threads, isa).forward(tokens, starts, "none", False)
            np.testing.assert_array_equal(got, expected, err_msg=isa)
    reference = Bert(model, as_served=True).forward(tokens, starts, "none", False)
    most = np.abs(reference).max()
    assert np.abs(expected - reference).max() < 5e-2 * most
    without = CpuEncoder(replace(model, factors={}), 1).forward(tokens, starts, "none", False)
    assert np.abs(without - reference).max() > 0.2 * most


def test_factors_must_fit(loud: EncoderCheckpoint) -> None:
    model = smooth_encoder(loud, "w8a8", smoothing_factors(loud, TEXTS))
    good = model.factors["layers.0.qkv"]
    for wrong in (good[:-1], -good, np.full_like(good, np.nan), np.zeros_like(good)):
        with pytest.raises(ModelFileError, match=r"factors of layers\.0\.qkv are one positive number"):
            replace(model, factors={"layers.0.qkv": wrong})
    with pytest.raises(ModelFileError, match=r"factors of layers\.7\.down"):
        replace(model, factors={"layers.7.down": good})


def test_a_smoothed_mixture_is_kept_beside_the_folder(loud: EncoderCheckpoint, tmp_path: Path) -> None:
    name = "w8a8/smooth,layers.*.qkv=w8a8-g64"
    made = encoder_from_name(loud, name)
    rounded = {key: weight for key, weight in made.weights.items() if isinstance(weight, QuantizedTensor)}
    out = tmp_path / "out"
    save_encoder(loud, out, made.formats.name, {}, rounded, made.factors)
    again = load(out, threads=1)
    assert isinstance(again, Encoder)
    text = " ".join(WORDS[4:])
    expected = Encoder.of(made, loud.tokenizer(), threads=1, normalize=loud.normalize).encode(text)
    np.testing.assert_array_equal(again.encode(text), expected)
    plain = load(out, threads=1, format="w8a8,layers.*.qkv=w8a8-g64")
    assert isinstance(plain, Encoder)
    assert not np.array_equal(plain.encode(text), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a8,layers.7.qkv=w8a16", r"layers are 0\.\.1; found: layers\.7\.qkv"),
        ("w8a8,layers.0.gate_up=w8a16", r"an override names layers\.I, layers\.I\.\{qkv,o,up,down\}"),
        ("w8a8,layers.0.qkv", "an override is PLACE=FORMAT"),
        ("bf16,layers.0.qkv=w8a8", "an encoder mixes integer formats"),
        ("w8a8,layers.0.qkv=q8_0", "encoders take fp32, bf16 or"),
        ("w8a8,layers.0.qkv=w9a8", "unknown format|a format is"),
        ("w8a8,layers.0.down=w8a8-g32,layers.0.down=w8a16", "a recipe names each change once"),
        ("w8a8,depth=1,layers.1.qkv=w8a16", r"layers are 0\.\.0"),
        ("bf16/smooth", "smoothing is for int8 activations"),
        ("w8a8/smoth", "try: w8a8/smooth"),
    ],
)
def test_names_of_mixtures(loud: EncoderCheckpoint, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_from_name(loud, name)


@given(st.lists(st.sampled_from(SPACE), min_size=8, max_size=8))
@settings(deadline=None)
def test_the_name_of_a_mixture_is_read_back(names: list[str]) -> None:
    from flatout.core.formats import compact

    linears = list(SPEC.linears())
    kinds = {kind: names[2 * j : 2 * j + 2] for j, kind in enumerate(linears)}
    usual, overrides = compact(kinds)
    formats = parse_encoder_formats(EncoderFormats(usual=usual, overrides=overrides).name)
    assert {kind: [formats.of(i, kind).name for i in range(2)] for kind in linears} == kinds


def tables(seed: int) -> Tables:
    """Two layers in three formats, the more careful the slower."""
    rng = np.random.default_rng(seed)
    places = []
    for kind in SPEC.linears():
        slower = np.cumsum([1.0, *rng.random(2)])
        for i in range(2):
            less = np.sort(rng.random(2))[::-1] * 1e-3
            places.append(
                tuple(
                    Choice(place=f"layers.{i}.{kind}", format=name, seconds=s, loss=lost, bytes=0.0)
                    for name, s, lost in zip(SPACE[:3], slower, [*less, 0.0], strict=True)
                )
            )
    return Tables(places=tuple(places), distance=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_proposals_are_the_best_of_all_mixtures(seed: int) -> None:
    found = tables(seed)
    margin = 2.5e-3
    every = [
        (found.distance + sum(c.loss for c in mixture), sum(c.seconds for c in mixture))
        for mixture in itertools.product(*found.places)
    ]
    quickest = min(seconds for lost, seconds in every if lost <= 0.9 * margin)
    proposals = propose(found, SPEC, margin)
    assert proposals
    losses = [proposal.distance for proposal in proposals]
    assert losses == sorted(losses, reverse=True)
    for proposal in proposals:
        assert found.of(proposal.formats) == pytest.approx((proposal.distance, proposal.seconds))
        assert proposal.seconds <= _SLOWER[-1] * quickest * (1 + 1e-6)
        least = min(lost for lost, seconds in every if seconds <= proposal.seconds * (1 + 1e-9))
        assert proposal.distance == pytest.approx(least)
        recipe = parse_encoder_recipe(proposal.recipe, SPEC)
        assert recipe.format == proposal.formats.name
        smoothed = [proposal.formats.of(i, kind).name for i in range(2) for kind in ("qkv", "up")]
        assert (recipe.method == "smooth") == ("w8a8" in smoothed)
    assert propose(found, SPEC, 5e-5) == []  # not even the most careful format


def test_what_parts_lose_adds_up_to_the_whole(tmp_path: Path) -> None:
    source = open_encoder(tiny_encoder_folder(tmp_path / "m", SPEC))
    space = ("w8a8", "w8a8-g64", "w8a8-g32")
    factors = smoothing_factors(source, TEXTS)
    uniform = {"w8a8": smooth_encoder(source, "w8a8", factors)}
    uniform |= {name: compress_encoder(source, name) for name in space[1:]}
    how = {"pooling": "mean", "normalize": True}
    texts = [" ".join(WORDS[4 + (i * j) % 9] for j in range(1, 12)) for i in range(1, 60)]
    exact = Encoder(Bert(compress_encoder(source, "fp32")), source.tokenizer(), **how).encode(texts)
    batch = np.array([[2, 5, 6, 7, 8, 3]] * 2, dtype=np.int32)
    bench = Mixtures(
        uniform, lambda model: Encoder.of(model, source.tokenizer(), threads=1, **how), texts, exact, batch
    )
    found = measure(bench, space, lambda what, done, of: None)
    assert found.distance == pytest.approx(bench.distance(EncoderFormats(usual="w8a8-g32")))
    for name in space:
        formats = EncoderFormats(usual=name)
        expected, seconds = found.of(formats)
        # Rounding errors of eight linears, whose products of unlike signs do not all cancel.
        assert expected == pytest.approx(bench.distance(formats), rel=0.5)
        assert seconds > 0
    quick = found.of(EncoderFormats(usual="w8a8"))[1]
    assert all(found.of(EncoderFormats(usual=name))[1] >= quick for name in space)
    mixed = bench.model(parse_encoder_formats("w8a8-g32,layers.1.qkv=w8a8"))
    assert list(mixed.factors) == ["layers.1.qkv"]
