"""ModelSpec: the shape and the arithmetic of a decoder-only Llama-like model, whatever file it came from.

Legend used everywhere: B batch, T tokens, D hidden size, F intermediate size, H query heads, G key/value
heads, E head size, V vocabulary, L layers, N output width, K input width of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass

from flatout.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling (config.json `rope_scaling` with rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and arithmetic of one model. Sizes are element counts; thetas and epsilons as in config.json."""

    family: str  # llama | mistral | qwen2 | qwen3 | gemma
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of q and k before RoPE
    activation: str = "silu"  # silu | gelu_tanh (Gemma)
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
    embedding_scale: float = 1.0  # Gemma multiplies embeddings by sqrt(D)
    sliding_window: int | None = None  # Mistral: keys further back than this are not seen
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": (self.vocab_size, 1 << 20),
            "hidden_size": (self.hidden_size, 1 << 17),
            "intermediate_size": (self.intermediate_size, 1 << 20),
            "num_layers": (self.num_layers, 1 << 10),
            "num_heads": (self.num_heads, 1 << 10),
            "num_kv_heads": (self.num_kv_heads, 1 << 10),
            "head_dim": (self.head_dim, 1 << 10),
            "max_positions": (self.max_positions, 1 << 26),
        }
        for name, (value, limit) in sizes.items():
            if not 1 <= value <= limit:
                raise UnsupportedModelError(
                    f"{name} must be between 1 and {limit}", str(value), "check config.json"
                )
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                "num_heads must be a multiple of num_kv_heads",
                f"{self.num_heads} and {self.num_kv_heads}",
                "check config.json",
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(
                "head_dim must be even for rotary embeddings", str(self.head_dim), "check config.json"
            )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v projection."""
        return self.q_size + 2 * self.kv_size

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each fused linear of one layer, in execution order: the unit a recipe decides on."""
        return {
            "qkv": (self.qkv_size, self.hidden_size),
            "o": (self.hidden_size, self.q_size),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    def num_parameters(self) -> int:
        """Stored parameters, tied embeddings counted once, norms and biases included."""
        layer = sum(n * k for n, k in self.linears().values()) + 2 * self.hidden_size
        if self.qkv_bias:
            layer += self.qkv_size
        if self.qk_norm:
            layer += 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def weight_names(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape of every weight the model must have (N, K for linears)."""
    D, F, E = spec.hidden_size, spec.intermediate_size, spec.head_dim
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, D)}
    for i in range(spec.num_layers):
        p = f"model.layers.{i}."
        names[p + "input_layernorm.weight"] = (D,)
        names[p + "self_attn.q_proj.weight"] = (spec.q_size, D)
        names[p + "self_attn.k_proj.weight"] = (spec.kv_size, D)
        names[p + "self_attn.v_proj.weight"] = (spec.kv_size, D)
        if spec.qkv_bias:
            names[p + "self_attn.q_proj.bias"] = (spec.q_size,)
            names[p + "self_attn.k_proj.bias"] = (spec.kv_size,)
            names[p + "self_attn.v_proj.bias"] = (spec.kv_size,)
        if spec.qk_norm:
            names[p + "self_attn.q_norm.weight"] = (E,)
            names[p + "self_attn.k_norm.weight"] = (E,)
        names[p + "self_attn.o_proj.weight"] = (D, spec.q_size)
        names[p + "post_attention_layernorm.weight"] = (D,)
        names[p + "mlp.gate_proj.weight"] = (F, D)
        names[p + "mlp.up_proj.weight"] = (F, D)
        names[p + "mlp.down_proj.weight"] = (D, F)
    names["model.norm.weight"] = (D,)
    if not spec.tie_embeddings:
        names["lm_head.weight"] = (spec.vocab_size, D)
    return names


FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Fused linear -> the Hugging Face linears it joins, in row order. They share one format."""
