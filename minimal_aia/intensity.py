"""Cross-modal intensity (Eq. 1 of arXiv 2511.22663) on plain tensors.

The intensity of a layer is the softmax attention that query tokens of one modality put on key tokens of the
other, summed over the keys and averaged over queries, heads and samples. Two ways to get it live here: the
readable one, from an attention matrix, and one that never builds the matrix.

Shapes: B samples, H query heads, Q query positions, K key positions, D head size, G groups of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_HEAD_LIMIT = 256  # the widest head that PyTorch's flash kernels take


def intensity_from_attention(
    attn: Tensor, query_mask: Tensor, key_mask: Tensor, per_head: bool = False
) -> Tensor:
    """Eq. 1 for one layer, read off its attention matrix: the reference everything else is tested against.

    Args:
        attn: attention probabilities (after the softmax), `[B, H, Q, K]`.
        query_mask: bool `[B, Q]`, True on the query tokens (generation: image tokens; understanding: answer
            tokens).
        key_mask: bool `[B, K]`, True on the key tokens of the other modality.
        per_head: keep the heads apart.

    Returns:
        `[B]`, or `[B, H]` with `per_head`; between 0 and 1; fp32 (fp64 for fp64 input). A sample whose query
        or key mask is empty has no intensity: it is nan there, and sends no gradient back.

    Raises:
        ValueError: if a mask is not boolean or does not fit `attn`.
    """
    if attn.dim() != 4:
        raise ValueError(f"attn must be [B, H, Q, K], got shape {list(attn.shape)}")
    batch, _, n_query, n_key = attn.shape
    _check_mask("query_mask", query_mask, (batch, n_query))
    _check_mask("key_mask", key_mask, (batch, n_key))
    attn = attn.to(_at_least_fp32(attn.dtype))  # a bf16 sum over hundreds of keys loses two digits
    mass = attn.masked_fill(~key_mask[:, None, None, :], 0.0).sum(-1)  # [B, H, Q]
    heads = mean_over_queries(mass, query_mask, key_mask)  # [B, H]
    return heads if per_head else heads.mean(-1)


def mean_over_queries(mass: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """Average `mass [B, H, Q]` over each sample's own query tokens -> `[B, H]`; nan if a span is empty."""
    n_query = query_mask.sum(-1)  # [B]
    # masked_fill and a safe divisor, not multiplication and 0/0: whatever an unmarked row holds, and an empty
    # sample, must reach neither the value nor the gradient of the others.
    total = mass.masked_fill(~query_mask[:, None, :], 0.0).sum(-1)  # [B, H]
    empty = (n_query == 0) | ~key_mask.any(-1)  # [B]
    return (total / n_query.clamp(min=1)[:, None]).masked_fill(empty[:, None], float("nan"))


def attention_with_intensity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention, and how much of it each query puts on the marked keys, without the `[Q, K]` matrix.

    The softmax weights over marked keys sum to an attention output: that of a value which is 1 on marked keys
    and 0 elsewhere. So indicator columns are appended to `v`, as many zeros to `q` and `k` (which change no
    dot product), and one fused call returns both. Eight columns, not one: fused kernels want aligned heads.

    Why not compute the marked rows only? Time of forward + backward, as a multiple of plain attention
    (`benchmarks/intensity_methods.py`: 4 heads of 128, 4 096 tokens, fp32, causal, one CPU thread):

        method                                           generation   understanding
        indicator columns (this function)                      1.05            1.12
        a second call, over the marked rows only               2.83            1.13
        exp(q.k - log-sum-exp), own backward                   1.72            1.12

    In generation nearly all rows are marked, so there is little to leave out; and log-sum-exp gradients need
    private kernels, one set a device.
    The floor of the first row is 136/128, 1.06 (less is noise): both products are eight columns wider, and
    nothing else is read or written but the mass. FlexAttention, whose log-sum-exp has a gradient on a GPU,
    has no backward on a CPU (PyTorch 2.13 refuses). No route has been measured on a GPU; a kernel over the
    marked rows is open.

    Args:
        q: `[B, H, Q, D]`.
        k: `[B, Hk, K, D]`; fewer heads than `q` means grouped-query attention (`H` a multiple of `Hk`).
        v: `[B, Hk, K, Dv]`; `Dv` may differ from `D`.
        key_mask: bool `[B, K]`, or `[B, G, K]` for several groups of keys at once.
        attn_mask, is_causal, scale, dropout_p: as in `torch.nn.functional.scaled_dot_product_attention`
            (boolean masks: True takes part; additive masks; causal aligned to the upper left corner).

    Returns:
        output `[B, H, Q, Dv]`, as the plain call gives it, and mass `[B, H, Q]` (or `[B, G, H, Q]`) in fp32
        (fp64 for fp64 input), both differentiable in q, k and v. A query that sees no key at all (a padding
        query) has mass 0. Dropout acts on the output only: the mass is that of the undropped attention.

    Raises:
        ValueError: if the shapes do not fit.
    """
    batch, n_heads, _, head_dim = q.shape
    groups = key_mask if key_mask.dim() == 3 else key_mask[:, None]  # [B, G, K]
    _check_mask("key_mask", groups, (batch, groups.shape[1], k.shape[2]))
    if n_heads % k.shape[1]:
        raise ValueError(f"{n_heads} query heads are not a multiple of {k.shape[1]} key heads")
    scale = head_dim**-0.5 if scale is None else scale  # of the real head size, not of the padded one
    gqa = n_heads != k.shape[1]
    if gqa and attn_mask is not None and q.device.type != "cpu":
        # only the CPU kernel takes grouped heads with a mask; elsewhere PyTorch would build the matrix
        k, v = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (k, v))
        gqa = False

    def attend(values: Tensor, dropout: float = 0.0) -> Tensor:
        width = -(-max(head_dim, values.shape[-1]) // 8) * 8  # equal and aligned, or fused kernels refuse
        out = F.scaled_dot_product_attention(
            _widen(q, width),
            _widen(k, width),
            _widen(values, width),
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=gqa,
        )
        return out[..., : values.shape[-1]]

    v_dim = v.shape[-1]
    indicator = groups.transpose(1, 2)[:, None].to(v.dtype).expand(-1, v.shape[1], -1, -1)  # [B, Hk, K, G]
    too_wide = max(head_dim, v_dim) <= FUSED_HEAD_LIMIT < max(head_dim, v_dim + groups.shape[1])
    if dropout_p > 0.0 or too_wide:
        out, mass = attend(v, dropout_p), attend(indicator)
    else:
        both = attend(torch.cat([v, indicator], dim=-1))
        out, mass = both[..., :v_dim], both[..., v_dim:]
    mass = mass.to(_at_least_fp32(v.dtype)).movedim(-1, 1)  # [B, G, H, Q]
    return out, mass if key_mask.dim() == 3 else mass[:, 0]


def _widen(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension up to `width`; the padded copy is contiguous, as fused kernels need."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
