"""A mixture of transformers: two experts with weights of their own, one self-attention over the sequence.

After BAGEL (arXiv 2505.14683): in every decoder layer the codes of a picture that is being drawn go through
the generation expert's norms, projections and feed-forward network; all other tokens (words, special tokens,
codes of a picture that was given) go through the understanding expert's. Queries, keys and values of both
meet in one causal attention. A token passes through one expert, so it costs what it costs in a Llama of this
width, and with equal experts the model is that Llama. As in BAGEL, the marker <boi> counts as text: it is the
understanding expert that predicts a picture's first code. Embeddings and output head are shared.

BAGEL itself is decoupled further: it reads pictures with a vision encoder and draws by flow matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

EXPERTS = ("understanding", "generation")


@strict
class MotConfig(LlamaConfig):
    """A Llama's configuration, and where words and image codes begin in the vocabulary.

    first_word_id: smaller ids are special tokens (<pad>, <bos>, <boi>, ...).
    first_code_id: this id and all above are image codes.
    """

    model_type = "aia_lab_mot"
    first_word_id: int = 0
    first_code_id: int = 0


def drawn_codes(ids: Tensor, config: MotConfig) -> Tensor:
    """Which tokens belong to a picture that is being drawn: image codes after a word. bool `[B, S]`.

    A picture that opens the sequence was given; one that follows words is drawn from them. Where that is not
    so (a second picture to read, a picture drawn from nothing), give the model a `generation_mask`.
    """
    code = ids >= config.first_code_id
    word = (ids >= config.first_word_id) & ~code
    return code & word.cumsum(-1).bool()


@dataclass
class Routing:
    """Who goes to which expert: tokens of `[B, S]` in order of their expert, and the way back."""

    order: Tensor  # [B * S]: positions of the understanding expert's tokens, then the generation expert's
    back: Tensor  # [B * S], its inverse
    counts: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Routing:
        order = mask.flatten().to(torch.uint8).argsort(stable=True)
        n = int(mask.sum())
        return cls(order, order.argsort(), (mask.numel() - n, n))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, S, ...]` to the experts' tokens, `[N, ...]` each (N may be 0)."""
        flat = x.flatten(0, 1)
        if all(self.counts):
            flat = flat.index_select(0, self.order)
        first, second = flat.split(self.counts)
        return first, second

    def join(self, first: Tensor, second: Tensor, shape: torch.Size) -> Tensor:
        """Both experts' tokens back to `[B, S, ...]` (`shape` is [B, S])."""
        flat = torch.cat([first, second])
        if all(self.counts):
            flat = flat.index_select(0, self.back)
        return flat.unflatten(0, shape)


class Expert(nn.Module):
    """One task's weights of a layer: all of a Llama layer's, on tokens `[N, D]`."""

    def __init__(self, config: MotConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        head_dim = config.head_dim or width // config.num_attention_heads
        queries = config.num_attention_heads * head_dim
        keys = (config.num_key_value_heads or config.num_attention_heads) * head_dim
        self.input_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def before(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, `[N, (H + 2 Hk) * head_dim]`."""
        x = self.input_layernorm(x)
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class SharedAttention(nn.Module):
    """Causal attention over the tokens of both experts; it has no weights."""

    is_causal = True

    def __init__(self, config: MotConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // (
            config.num_key_value_heads or config.num_attention_heads
        )
        self.scaling = self.head_dim**-0.5

    def forward(
        self,
        qkv: Tensor,  # [B, S, (H + 2 Hk) * head_dim]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """-> `[B, S, H * head_dim]`, and the attention weights where the implementation returns them."""
        heads = self.config.num_attention_heads
        groups = heads // self.num_key_value_groups
        parts = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 Hk, S, head_dim]
        query, key, value = parts.split([heads, groups, groups], dim=1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return out.flatten(2), weights


class MotLayer(GradientCheckpointingLayer):
    """A decoder layer: `understanding` and `generation` experts around one attention."""

    def __init__(self, config: MotConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SharedAttention(config, layer_idx)
        self.understanding = Expert(config)
        self.generation = Expert(config)

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, D]
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        *,
        routing: Routing,
        **kwargs: Any,
    ) -> Tensor:
        shape = hidden_states.shape[:2]
        u, g = routing.split(hidden_states)
        qkv = routing.join(self.understanding.before(u), self.generation.before(g), shape)
        attended, _ = self.self_attn(qkv, position_embeddings, attention_mask, past_key_values, **kwargs)
        read, drawn = routing.split(attended)
        return routing.join(self.understanding.after(u, read), self.generation.after(g, drawn), shape)


class MotPreTrainedModel(LlamaPreTrainedModel):
    config: MotConfig
    config_class = MotConfig
    _no_split_modules = ["MotLayer"]  # noqa: RUF012
    _can_compile_fullgraph = False  # how many tokens an expert gets depends on the data
    _can_record_outputs = {"hidden_states": MotLayer, "attentions": SharedAttention}  # noqa: RUF012


class MotModel(MotPreTrainedModel, LlamaModel):
    """The decoder: Llama's own forward pass over `MotLayer`s, with a final norm an expert (as in BAGEL)."""

    def __init__(self, config: MotConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MotLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Identity()  # Llama's place for it; ours needs the routing
        self.norms = nn.ModuleDict(
            {name: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for name in EXPERTS}
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        generation_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """generation_mask: bool `[B, S]` over the tokens given now, True for the generation expert's.

        Without it `drawn_codes` decides, which needs the whole sequence as `input_ids`.

        Raises:
            ValueError: no mask, and embeddings, or codes that continue a cache.
        """
        if generation_mask is None:
            generation_mask = self._route(input_ids, kwargs.get("past_key_values"))
        routing = Routing.of(generation_mask)
        out = super().forward(input_ids=input_ids, routing=routing, **kwargs)
        last = out.last_hidden_state
        u, g = routing.split(last)
        out.last_hidden_state = routing.join(
            self.norms["understanding"](u), self.norms["generation"](g), last.shape[:2]
        )
        if out.hidden_states:
            out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
        return out

    def _route(self, ids: Tensor | None, cache: Cache | None) -> Tensor:
        if ids is None:
            raise ValueError(
                "embeddings do not say which tokens are drawn: give generation_mask, bool [B, S]"
            )
        mask = drawn_codes(ids, self.config)
        if cache is not None and cache.get_seq_length() and (ids >= self.config.first_code_id).any():
            raise ValueError("image codes continue a cache: give generation_mask, True where they are drawn")
        return mask


class MotForCausalLM(MotPreTrainedModel, LlamaForCausalLM):
    """`MotModel` with the shared output head; loss, saving and `generate` are Llama's."""

    def __init__(self, config: MotConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would build a Llama first
        self.model = MotModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, generation_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`generate` hands over one new token a step: route it by the whole sequence so far.

        generation_mask: for the tokens of the prompt; codes that `generate` adds are drawn.
        """
        mask = drawn_codes(input_ids, self.config)
        if generation_mask is not None:
            given = generation_mask.shape[1]
            mask = torch.cat([generation_mask, input_ids[:, given:] >= self.config.first_code_id], dim=1)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get("input_ids") is not None:
            mask = mask[:, -inputs["input_ids"].shape[1] :]
        return {**inputs, "generation_mask": mask}


AutoConfig.register(MotConfig.model_type, MotConfig, exist_ok=True)
AutoModel.register(MotConfig, MotModel, exist_ok=True)
AutoModelForCausalLM.register(MotConfig, MotForCausalLM, exist_ok=True)
