"""Stand-ins for three models with code of their authors: the same calls and layouts, our own code.

They are tiny and random. What they share with the real models is what the adapters rely on: names,
arguments, the order of tokens, and how attention is called.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from checkpoints import llama_like_tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

WIDTH, HEADS, KV_HEADS, HEAD = 16, 4, 2, 8


def tokenizer() -> Any:
    special = ["<boi>", "<eoi>", "<img>", "<cfg>", "<timestep>", "<image>", "<|User|>", "<|Assistant|>"]
    return llama_like_tokenizer(special, bos="<bos>", eos="<eos>", pad="<pad>")


def sharp(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6 if parameter.dim() > 1 else 0.1)
    return model.eval()


# HunyuanImage-3.0
# ---------------------------------------------------------------------------------------------


class HunyuanImage3SDPAAttention(nn.Module):
    """qkv in one projection, grouped; repeated keys and values; boolean mask; static cache over the whole
    sequence."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.groups = layer_idx, HEADS // KV_HEADS
        self.qkv_proj = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value):
        b, n, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).reshape(b, n, KV_HEADS, self.groups + 2, HEAD)
        q, k, v = qkv.split([self.groups, 1, 1], dim=3)
        q = q.reshape(b, n, HEADS, HEAD).transpose(1, 2)
        k, v = (x.reshape(b, n, KV_HEADS, HEAD).transpose(1, 2) for x in (k, v))
        k, v = past_key_value.update(k, v, self.layer_idx, position_ids)
        k, v = (x.repeat_interleave(self.groups, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


class StaticCache:
    def __init__(self, length: int) -> None:
        self.length, self.kept = length, {}

    def update(self, k: Tensor, v: Tensor, layer: int, position_ids: Tensor):
        if layer not in self.kept:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.kept[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        where = position_ids[:, None, :, None].expand_as(k)
        for store, new in zip(self.kept[layer], (k, v)):
            store.scatter_(2, where, new)
        return self.kept[layer]


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, x, *args):
        return x + self.self_attn(nn.functional.layer_norm(x, x.shape[-1:]), *args)


class HunyuanImage3ForCausalMM(nn.Module):
    N_IMAGE = 6

    def __init__(self, system: str = "") -> None:
        super().__init__()
        self._tkwrapper = SimpleNamespace(tokenizer=tokenizer())
        self.system = system
        self.embed = nn.Embedding(len(self._tkwrapper.tokenizer), WIDTH)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(HunyuanImage3SDPAAttention(i)) for i in range(3))

    def prepare_model_inputs(self, prompt, mode, image_size, seed, system_prompt):
        assert mode == "gen_image"
        assert system_prompt is None
        tk = self._tkwrapper.tokenizer
        one = tk.convert_tokens_to_ids
        rows, slices = [], []
        for conditional in (True, False):
            tokens, parts = [tk.bos_token_id], []
            for text, is_prompt in (
                (self.system, False),
                ("User: ", False),
                (prompt[0], True),
                ("\n\n", False),
            ):
                ids = tk.encode(text, add_special_tokens=False)
                if is_prompt and not conditional:
                    ids = [one("<cfg>")] * len(ids)
                parts.append(slice(len(tokens), len(tokens) + len(ids)))
                tokens += ids
            rows.append(
                [*tokens, one("<boi>"), one("<timestep>"), *[one("<img>")] * self.N_IMAGE, one("<eoi>")]
            )
            slices.append(parts)
        tokens = torch.tensor(rows)
        output = SimpleNamespace(
            tokens=tokens, text_slices=slices, gen_image_mask=(tokens == one("<img>")).float()
        )
        generator = torch.Generator().manual_seed(seed)
        return {
            "tokenizer_output": output,
            "generator": generator,
            "past_key_values": StaticCache(tokens.shape[1]),
        }

    def _generate(self, tokenizer_output, generator, past_key_values, diff_infer_steps):
        tokens = tokenizer_output.tokens
        image = tokenizer_output.gen_image_mask.bool()
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril().repeat(2, 1, 1)
        mask |= image[:, :, None] & image[:, None, :]
        latents = torch.randn(1, self.N_IMAGE, WIDTH, generator=generator)
        position = torch.arange(tokens.shape[1]).expand(2, -1)
        for step in range(diff_infer_steps):
            x = self.embed(tokens.gather(1, position)) + step
            x[:, -self.N_IMAGE :] if step else None
            where = image if step == 0 else torch.tensor([False] + [True] * self.N_IMAGE).expand(2, -1)
            x = x.masked_scatter(where[..., None], latents.expand(2, -1, -1).contiguous())
            rows = mask.gather(1, position[..., None].expand(-1, -1, mask.shape[2]))[:, None]
            for layer in self.model.layers:
                x = layer(x, rows, position, past_key_values)
            conditional, unconditional = x[where].view(2, self.N_IMAGE, WIDTH)
            latents = latents - 0.1 * (unconditional + 3.0 * (conditional - unconditional))
            if step == 0:
                keep = (
                    torch.cat([image[:, 1:], image[:, :1]], 1) | image
                )  # the time token stands before the image
                position = position[keep].view(2, -1)
        return latents


# DeepSeek-VL2
# -------------------------------------------------------------------------------------------------


class DeepseekVLV2Processor:
    """Answers labelled with their end token, image tokens marked, padding on the left."""

    ignore_id = -100

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.bos_id, self.eos_id, self.pad_id = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
        )

    def process_one(self, conversations, images, inference_mode):
        assert not inference_mode
        ids, labels, seen = [self.bos_id], [self.bos_id], [False]
        pictures = iter(images)
        for message in conversations:
            if message["role"] == "<|User|>":
                pieces = f"<|User|>: {message['content'].strip()}\n\n<|Assistant|>:".split("<image>")
                for i, piece in enumerate(pieces):
                    if i:
                        n = 3 + next(pictures).width // 10
                        ids += [self.tokenizer.convert_tokens_to_ids("<image>")] * n
                        labels += [self.ignore_id] * n
                        seen += [True] * n
                    text = self.tokenizer.encode(piece, add_special_tokens=False)
                    ids += text
                    labels += [self.ignore_id] * len(text)
                    seen += [False] * len(text)
            else:
                text = [*self.tokenizer.encode(message["content"], add_special_tokens=False), self.eos_id]
                ids += text
                labels += text
                seen += [False] * len(text)
        return SimpleNamespace(
            input_ids=torch.tensor(ids), target_ids=torch.tensor(labels), seen=torch.tensor(seen)
        )

    def batchify(self, rows):
        def left(tensors, value):
            return pad_sequence([t.flip(0) for t in tensors], True, value).flip(1)

        ids = left([r.input_ids for r in rows], self.pad_id)
        return SimpleNamespace(
            input_ids=ids,
            labels=left([r.target_ids for r in rows], self.ignore_id),
            images_seq_mask=left([r.seen for r in rows], False),
            attention_mask=ids != self.pad_id,
            images=torch.zeros(len(rows), 1, 3, 4, 4),
            images_spatial_crop=torch.ones(len(rows), 1, 2, dtype=torch.long),
        )


class DeepseekV2Attention(nn.Module):
    """Explicit softmax; queries and keys are wider than values; weights only on request."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.kv = nn.Linear(WIDTH, HEADS * 12), nn.Linear(WIDTH, HEADS * (12 + HEAD))
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, hidden_states, attention_mask=None, output_attentions=False, use_cache=False):
        b, n, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(b, n, HEADS, 12).transpose(1, 2)
        k, v = self.kv(hidden_states).view(b, n, HEADS, 12 + HEAD).transpose(1, 2).split([12, HEAD], -1)
        weights = (q @ k.transpose(2, 3) * 12**-0.5 + attention_mask).softmax(-1, dtype=torch.float32)
        out = self.o_proj((weights @ v).transpose(1, 2).reshape(b, n, -1))
        return out, weights if output_attentions else None, None


class DeepseekVLV2ForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language = nn.Module()
        self.language.model = nn.Module()
        self.language.model.embed = nn.Embedding(400, WIDTH)
        layers = [nn.Module() for _ in range(3)]
        for layer in layers:
            layer.self_attn = DeepseekV2Attention()
        self.language.model.layers = nn.ModuleList(layers)

    def forward(
        self,
        input_ids,
        attention_mask,
        images,
        images_seq_mask,
        images_spatial_crop,
        use_cache=None,
        output_attentions=False,
    ):
        n = input_ids.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool).tril() & attention_mask.bool()[:, None, :]
        mask = torch.zeros(len(input_ids), 1, n, n).masked_fill(
            ~allowed[:, None], torch.finfo(torch.float32).min
        )
        x, kept = self.language.model.embed(input_ids), []
        for layer in self.language.model.layers:
            out, weights, _ = layer.self_attn(
                hidden_states=nn.functional.layer_norm(x, x.shape[-1:]),
                attention_mask=mask,
                output_attentions=output_attentions,
                use_cache=use_cache,
            )
            x = x + out
            kept.append(weights)
        return SimpleNamespace(last_hidden_state=x, attentions=kept)


# BAGEL
# --------------------------------------------------------------------------------------------------------


def flash_attn_varlen_func(**_kwargs):
    raise RuntimeError("the stand-in has no flash-attn; tests point this name elsewhere")


class PackedAttentionMoT(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, KV_HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x, cache, update, is_causal):  # [T, D]
        q = self.q_proj(x).view(-1, HEADS, HEAD)
        k, v = (p(x).view(-1, KV_HEADS, HEAD) for p in (self.k_proj, self.v_proj))
        if self.layer_idx in cache:
            k, v = (torch.cat([old, new]) for old, new in zip(cache[self.layer_idx], (k, v)))
        if update:
            cache[self.layer_idx] = (k, v)
        out = flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=torch.tensor([0, len(q)], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, len(k)], dtype=torch.int32),
            max_seqlen_q=len(q),
            max_seqlen_k=len(k),
            causal=is_causal,
        )
        return self.o_proj(out.reshape(len(q), -1))


class Bagel(nn.Module):
    latent_downsample, vit_patch_size = 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, WIDTH)
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.layers = nn.ModuleList(Layer(PackedAttentionMoT(i)) for i in range(3))

    def run(self, x, cache, update, is_causal):
        for layer in self.language_model.model.layers:
            x = layer(x, cache, update, is_causal)
        return x


class InterleaveInferencer:
    def __init__(self) -> None:
        self.model = sharp(Bagel())
        self.tokenizer = llama_like_tokenizer([], bos="<bos>", eos="<eos>", pad="<pad>")
        self.tokenizer.add_bos_token = False
        encode = self.tokenizer.encode
        self.tokenizer.encode = lambda text: encode(text, add_special_tokens=False)
        self.new_token_ids = {"bos_token_id": 1, "eos_token_id": 2, "start_of_image": 3, "end_of_image": 4}
        self.vae_transform = SimpleNamespace(resize_transform=lambda picture: picture.resize((16, 24)))

    def vit_transform(self, picture) -> Tensor:
        return (
            torch.zeros(3, picture.height // 4 * 4, picture.width // 4 * 4)
            + sum(picture.getpixel((0, 0))) / 255
        )

    def init_gen_context(self) -> dict[str, Any]:
        return {"kv_lens": [0], "ropes": [0], "past_key_values": {}}

    def _add(self, x, context, is_causal) -> dict[str, Any]:
        cache = dict(context["past_key_values"])
        self.model.run(x, cache, True, is_causal)
        return {"kv_lens": [context["kv_lens"][0] + len(x)], "ropes": [0], "past_key_values": cache}

    def update_context_text(self, text, context):
        ids = [1, *self.tokenizer.encode(text), 2]
        return self._add(self.model.embed(torch.tensor(ids)), context, True)

    def picture_embeddings(self, picture) -> Tensor:
        pixels = self.vit_transform(picture)
        n = (pixels.shape[1] // 4) * (pixels.shape[2] // 4)
        inside = self.model.embed(torch.arange(10, 10 + n)) + pixels.mean()
        return torch.cat([self.model.embed(torch.tensor([3])), inside, self.model.embed(torch.tensor([4]))])

    def update_context_image(self, picture, context, vae=True, vit=True):
        assert vit
        assert not vae
        return self._add(self.picture_embeddings(picture), context, False)

    def gen_image(self, image_shape, context, cfg_text_precontext, cfg_img_precontext, num_timesteps):
        n = (image_shape[0] // 8) * (image_shape[1] // 8)
        latents = torch.randn(n, WIDTH)
        self.read = []
        for _ in range(num_timesteps):
            ends = self.model.embed(torch.tensor([3, 4]))
            x = torch.cat([ends[:1], latents, ends[1:]])
            self.read.append(x)
            given, free = (
                self.model.run(x, dict(c["past_key_values"]), False, False)[1:-1]
                for c in (context, cfg_text_precontext)
            )
            self.model.run(x, dict(cfg_img_precontext["past_key_values"]), False, False)
            latents = latents - 0.1 * (free + 2.0 * (given - free))
        return latents
