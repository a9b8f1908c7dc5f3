"""compress/structure.py, importance.py, choice.py and vocabulary.py: children against what they must
compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from fake_bench import HARDWARE
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import TinySource, tiny_source, tiny_spec, tiny_tensors, write_tokenizer

from flatout.compress.apply import compress
from flatout.compress.choice import choose, mean_loss, seconds_on
from flatout.compress.importance import Importance, measure
from flatout.compress.structure import cut, restructured, with_tokens
from flatout.compress.vocabulary import kept_tokens, trimmed
from flatout.core.artifact import load_artifact, save_artifact
from flatout.core.formats import uniform
from flatout.core.fuse import float_recipe, native_recipe
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec, weight_names
from flatout.core.structure import Structure
from flatout.core.tokenizer import Tokenizer
from flatout.core.types import Workload
from flatout.errors import ConfigError, EvidenceError, UnsupportedModelError
from flatout.models.llama import Llama

TOKENS = [(7 * i * i + 3) % 320 for i in range(50)]


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 320, 70), rng.integers(0, 320, 80)]


def logits(source: Any) -> torch.Tensor:
    return Llama(source).forward(TOKENS)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the order of float32 sums."""
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def without(spec: ModelSpec, dead: dict[str, Any]) -> TinySource:
    """Random weights with zeros written by `dead`: name -> index."""
    tensors = tiny_tensors(spec)
    for name, index in dead.items():
        tensors[name] = tensors[name].copy()
        tensors[name][index] = 0
    return TinySource(spec, tensors)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_channels_that_add_nothing_can_go(family: str) -> None:
    spec = tiny_spec(family)
    rng = np.random.default_rng(0)
    dead = {f"model.layers.{i}.mlp.down_proj.weight": np.s_[:, rng.permutation(128)[:64]] for i in (0, 1)}
    source = without(spec, dead)
    child = restructured(source, Structure(ffn=64), documents())
    assert child.spec == replace(spec, intermediate_size=64)
    assert close(logits(child), logits(source))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("group", [0, 1])
def test_groups_that_add_nothing_can_go(family: str, group: int) -> None:
    spec = tiny_spec(family)
    width = 2 * spec.head_dim  # two query heads read one key/value head
    where = np.s_[:, group * width : (group + 1) * width]
    source = without(spec, {f"model.layers.{i}.self_attn.o_proj.weight": where for i in (0, 1)})
    child = restructured(source, Structure(groups=1), documents())
    assert (child.spec.num_heads, child.spec.num_kv_heads, child.spec.head_dim) == (2, 1, spec.head_dim)
    assert close(logits(child), logits(source))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_adds_nothing_can_go(layer: int) -> None:
    spec = tiny_spec("llama", num_layers=3)
    p = f"model.layers.{layer}."
    source = without(spec, {p + "self_attn.o_proj.weight": np.s_[:], p + "mlp.down_proj.weight": np.s_[:]})
    child = restructured(source, Structure(depth=2), documents())
    assert child.layers == tuple(i for i in range(3) if i != layer)
    assert close(logits(child), logits(source))


def test_equal_heads_can_be_averaged() -> None:
    """Grouped-query conversion is exact where the heads that it joins are the same."""
    spec = tiny_spec("qwen2")
    tensors = tiny_tensors(spec)
    for name in tensors:
        if ".k_proj." in name or ".v_proj." in name:
            tensors[name][16:] = tensors[name][:16]
    source = TinySource(spec, tensors)
    child = restructured(source, Structure(kv_heads=1), [])
    assert (child.spec.num_heads, child.spec.num_kv_heads) == (4, 1)
    assert close(logits(child), logits(source))
    other = restructured(tiny_source(spec), Structure(kv_heads=1), [])
    halves = tiny_source(spec).array("model.layers.0.self_attn.k_proj.weight").reshape(2, 16, 64)
    np.testing.assert_allclose(other.array("model.layers.0.self_attn.k_proj.weight"), halves.mean(axis=0))


def test_everything_at_once_is_an_ordinary_model(tmp_path: Path) -> None:
    """The child is saved, loaded, and computes the same in transformers."""
    from transformers import AutoModelForCausalLM

    spec = tiny_spec("llama", num_layers=3, num_kv_heads=4)
    child = restructured(tiny_source(spec), Structure(depth=2, ffn=96, groups=2, kv_heads=1), documents())
    assert {name: child.array(name).shape for name in weight_names(child.spec)} == weight_names(child.spec)
    write_tokenizer(tmp_path, 320)
    model = compress(child, float_recipe("fp32"))
    out = save_artifact(model, Tokenizer.from_folder(tmp_path), tmp_path / "child", {})
    ours = logits(load_artifact(out)[0])
    assert close(ours, logits(child))
    other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(other(torch.tensor([TOKENS])).logits[0], ours)


def test_blocks_of_the_file_stay_where_whole_rows_go() -> None:
    spec = tiny_spec("llama")
    source = tiny_source(spec, layers="q4_1", head="q8_0")
    child = restructured(source, Structure(ffn=64), documents())
    up, down = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down"))
    assert child.native(down) is None
    kept = child.native(up)
    assert isinstance(kept, QuantizedTensor)
    np.testing.assert_array_equal(kept.dequantize(), child.array(up))
    recipe = native_recipe(child, fallback="fp32")
    assert recipe.format_of(0, "down").name == "fp32"
    assert close(logits(compress(child, recipe)), logits(child))


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ((("depth", 0),), "depth lies between 1 and the model's 2"),
        ((("ffn", 129),), "ffn lies between"),
        ((("groups", 3),), "groups lies between"),
        ((("kv-heads", 3),), "kv-heads lies between"),
        ((("width", 3),), "a structure gives each of"),
        ((("ffn", 64), ("ffn", 32)), "once"),
    ],
)
def test_sizes_that_a_model_does_not_have(sizes: tuple[tuple[str, int], ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        restructured(tiny_source(tiny_spec()), Structure.of(sizes), documents())


def test_heads_that_do_not_divide_are_not_averaged() -> None:
    spec = tiny_spec(num_heads=6, num_kv_heads=3, hidden_size=96)
    with pytest.raises(ConfigError, match="as many key/value heads"):
        Structure(kv_heads=2).child(spec)


def test_importance_needs_text_and_its_own_model() -> None:
    source = tiny_source(tiny_spec())
    with pytest.raises(ConfigError, match="at least 128 tokens"):
        restructured(source, Structure(depth=1), [])
    with pytest.raises(ConfigError, match="measured on the model that is cut"):
        cut(source, Structure(depth=1), Importance.equal(tiny_spec(num_layers=3)))
    tensors = source.tensors | {"lm_head.weight": source.tensors["lm_head.weight"] * 40}
    with pytest.raises(EvidenceError, match="better than random tokens"):
        measure(TinySource(source.spec, tensors), documents())


def test_importance_is_the_plain_formula() -> None:
    """Channels and groups against what a layer computes when all others are silenced."""
    spec = tiny_spec(num_layers=1)
    source, text = tiny_source(spec), documents()
    found = measure(source, text)
    from flatout.compress.inputs import linear_inputs

    seen: dict[str, np.ndarray] = {}
    hidden: list[torch.Tensor] = []

    def see(name: str, inputs: torch.Tensor, before: torch.Tensor, weight: np.ndarray) -> None:
        seen[name] = inputs.numpy()
        hidden.append(before)

    linear_inputs(source, text, see)
    down = source.array("model.layers.0.mlp.down_proj.weight")
    for channel in (0, 77):
        added = np.outer(seen["layers.0.down"][:, channel], down[:, channel])
        np.testing.assert_allclose(found.channels[0, channel], (added**2).sum(axis=1).mean(), rtol=1e-5)
    o = source.array("model.layers.0.self_attn.o_proj.weight")
    added = seen["layers.0.o"][:, 32:] @ o[:, 32:].T
    np.testing.assert_allclose(found.groups[0, 1], (added**2).sum(axis=1).mean(), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(hidden[0], hidden[-1], dim=1).mean()
    np.testing.assert_allclose(found.layers[0], 1 - float(cosine), rtol=1e-4)


def own_text(source: TinySource) -> list[np.ndarray]:
    """What the model says itself, which no cut model finds as likely."""
    torch.manual_seed(0)
    found = []
    for first in (5, 9):
        ids = [first]
        for _ in range(90):
            ids.append(int(torch.multinomial(torch.softmax(Llama(source).forward(ids)[-1], dim=0), 1)))
        found.append(np.array(ids))
    return found


def test_choices_keep_to_the_share_and_prefer_what_costs_nothing() -> None:
    """Half of the channels are dead: cutting them is free, so every other cut comes later."""
    spec = tiny_spec("llama", num_layers=3)
    dead = {f"model.layers.{i}.mlp.down_proj.weight": np.s_[:, 64:] for i in range(3)}
    source = without(spec, dead)
    source = TinySource(spec, source.tensors | {"lm_head.weight": 3 * source.tensors["lm_head.weight"]})
    text = own_text(source)
    choices = choose(source, measure(source, text), text, 0.8, ModelSpec.num_parameters, tile=32)
    best = choices[0]
    assert best.structure.ffn == 64
    assert (best.structure.depth, best.structure.groups) == (3, 2)
    assert abs(best.expected_loss) < 1e-5
    for choice in choices:
        share = choice.structure.child(spec).num_parameters() / spec.num_parameters()
        assert choice.cost == pytest.approx(share)
        assert share <= 0.8
        assert choice.structure.ffn is not None
        assert choice.structure.ffn % 32 == 0
    with pytest.raises(ConfigError, match="none of those tried does"):
        choose(source, measure(source, text), text, 0.01, ModelSpec.num_parameters, tile=32)
    with pytest.raises(ConfigError, match="a share of its parent between 0 and 1"):
        choose(source, measure(source, text), text, 1.5, ModelSpec.num_parameters)


def test_predicted_seconds_are_a_cost() -> None:
    seconds = seconds_on(HARDWARE, uniform("bf16", kv_cache="bf16"), Workload(prompt=64, output=16))
    spec = tiny_spec()
    whole = seconds(spec)
    assert seconds(Structure(ffn=64).child(spec)) < whole
    assert seconds(Structure(depth=1).child(spec)) < seconds(Structure(ffn=64).child(spec))


def test_mean_loss_is_the_mean() -> None:
    source = tiny_source(tiny_spec())
    text = documents()
    found = []
    for document in text:
        log_p = torch.log_softmax(Llama(source).forward(document), dim=1)
        found += [-float(log_p[i, int(token)]) for i, token in enumerate(document[1:])]
    assert mean_loss(source, text) == pytest.approx(np.mean(found), rel=1e-5)
    with pytest.raises(ConfigError, match="two tokens or more"):
        mean_loss(source, [np.array([3])])


# Vocabulary


def bpe(kind: str) -> Tokenizer:
    """A byte-level or a SentencePiece-like tokenizer, trained on a few sentences, with special tokens."""
    text = [
        "the sea was grey and the ships were cold in the harbour of the northern town",
        "there is nothing either good or bad but thinking makes it so",
        "numbers such as 1999 and 2026 and words like antidisestablishmentarianism",
    ] * 4
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = tokenizers.Tokenizer(
            tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        inner.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
        )
        alphabet = []
        special += [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(text, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "$B:1"], special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return Tokenizer(inner, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


BYTES, PIECES = bpe("bytes"), bpe("pieces")
CORPUS = "the grey ships were there and nothing was cold"
WORDS = st.lists(
    st.sampled_from(
        ["the", "sea", "was", "grey", "and", "ships", "were", "cold", "nothing", "thinking", "1999", "x"]
    ),
    max_size=6,
)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
@settings(max_examples=40, deadline=None)
@given(words=WORDS, other=st.text(max_size=12))
def test_text_is_cut_as_before_where_its_tokens_stay(
    tokenizer: Tokenizer, words: list[str], other: str
) -> None:
    kept = kept_tokens(tokenizer, [CORPUS], multiple=1)
    small = trimmed(tokenizer, kept)
    assert small.vocab_size == len(kept) < tokenizer.vocab_size
    for text in (CORPUS, " ".join(words), other):
        before = tokenizer.encode(text)
        after = small.encode(text)
        if set(before) <= set(kept.tolist()):
            assert kept[after].tolist() == before
        assert small.decode(after) == tokenizer.decode(before)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_ids_and_special_tokens_are_renumbered_together(tokenizer: Tokenizer) -> None:
    kept = kept_tokens(tokenizer, [CORPUS], multiple=16)
    assert len(kept) % 16 == 0
    small = trimmed(tokenizer, kept)
    for text in (CORPUS, "<s>cold</s>"):
        assert kept[small.encode(text)].tolist() == tokenizer.encode(text)
    assert small.adds_bos
    assert small.bos is not None
    assert kept[small.bos] == tokenizer.bos
    assert small._inner.encode(CORPUS).ids[0] == small.bos  # its template has the new id as well
    again = Tokenizer.from_state(*small.state())
    assert again.encode(CORPUS) == small.encode(CORPUS)


def test_the_most_frequent_tokens_stay_when_room_is_short() -> None:
    needed = len(kept_tokens(BYTES, [], multiple=1))
    kept = kept_tokens(BYTES, ["cold cold cold", "grey"], most=needed + 3, multiple=1)
    assert len(kept) <= needed + 3
    small = trimmed(BYTES, kept)
    assert small.decode(small.encode("grey cold \U0001f98a")) == "grey cold \U0001f98a"
    with pytest.raises(ConfigError, match=f"are {needed} tokens"):
        kept_tokens(BYTES, [CORPUS], most=needed - 1)


def test_sets_that_are_not_closed_are_refused() -> None:
    kept = kept_tokens(BYTES, [CORPUS], multiple=1)
    with pytest.raises(ConfigError, match="special tokens stay"):
        trimmed(BYTES, kept[1:])
    the = BYTES.encode("the")[0]
    assert the in kept
    parts = [i for i in BYTES.encode("th") + BYTES.encode("he") if i > 258]
    with pytest.raises(ConfigError, match="the parts of a kept token stay"):
        trimmed(BYTES, np.array([i for i in kept if i not in parts]))


def test_other_kinds_of_vocabulary_are_refused() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    inner.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(UnsupportedModelError, match="trimmed for BPE and WordPiece"):
        kept_tokens(Tokenizer(inner, {}), ["a"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [None, "q8_0"])
def test_a_model_of_fewer_tokens(tied: bool, head: str | None) -> None:
    """Logits of the kept tokens are those that they had."""
    spec = tiny_spec("llama", tie_embeddings=tied)
    source = tiny_source(spec, head=head)
    kept = np.array([0, 1, 2, *range(40, 100)])
    child = with_tokens(source, kept)
    assert (child.spec.vocab_size, child.spec.bos_token_id, child.spec.eos_token_ids) == (63, 1, (2,))
    ids = np.arange(5, 60)
    ours, theirs = Llama(child).forward(ids), Llama(source).forward(kept[ids])
    assert close(ours, theirs[:, kept])
    assert (child.native("model.embed_tokens.weight") is None) == (head is None)


@pytest.mark.parametrize("tokens", [[], [5, 5, 1, 2], [320, 1, 2], [-1, 1, 2], [1, 5], [2, 5]])
def test_tokens_that_cannot_be_kept(tokens: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"each once|begin and end of text stay"):
        with_tokens(tiny_source(tiny_spec()), np.array(tokens))
