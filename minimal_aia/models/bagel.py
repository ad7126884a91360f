"""BAGEL, both tasks. **Written against the authors' published code, not run with their weights.**

What it relies on: their `InterleaveInferencer` (contexts that grow piece by piece, one conversation at a
time; `gen_image` denoises against a context) and `PackedAttentionMoT` in `modeling.bagel.qwen2_navit`,
whose inference path calls the module's `flash_attn_varlen_func(q [T, H, D], k [T', Hk, D], v, cu_seqlens_q,
cu_seqlens_k, ..., causal)`. That name is pointed at a plain PyTorch equivalent, so flash-attn is not needed
and the intensity can be recorded. Tested on a small stand-in of ours with the same calls and layout.

Sequences: a text is [begin, words, end]; a picture to understand is [start, ViT tokens, end] (no VAE
tokens, as the authors use for understanding); a picture to draw is [start, latent tokens, end], read at
every denoising step.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minimal_aia.models.base import Adapter, AdapterError, Batch, causal_but_within
from minimal_aia.models.draw import noise_seed
from minimal_aia.models.loading import authors_code, check_memory, default_device, display_name
from minimal_aia.models.records import CallSpans, StepRecord, capture_sdpa
from minimal_aia.pictures import open_picture

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.registry import Family


REPOSITORY = "github.com/ByteDance-Seed/Bagel"


class BagelAdapter(Adapter):
    """BAGEL-7B-MoT. `layers()` are the decoder layers of its language model.

    Options of `load_adapter`: `code` (a checkout of the authors' repository), `steps` (denoising steps,
    default 50), `image_shape` (height, width), `seed`, and `call`, further arguments for
    `InterleaveInferencer.gen_image`.
    """

    family = "bagel"
    tasks = ("generation", "understanding")

    def __init__(
        self,
        name: str,
        inferencer: Any,
        steps: int = 50,
        image_shape: tuple[int, int] = (1024, 1024),
        seed: int = 0,
        call: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name, inferencer.model)
        self.inferencer, self.steps, self.image_shape, self.seed = inferencer, steps, image_shape, seed
        self.call = call or {}
        self._now = 0  # the sample that is being read

    @classmethod
    def load(
        cls,
        name: str,
        family: Family,
        *,
        code: str | Path | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        load_in_4bit: bool = False,
        **options: Any,
    ) -> BagelAdapter:
        if load_in_4bit:
            raise AdapterError(f"{name}: load_in_4bit is not supported for bagel")
        device, folder = device or default_device(), Path(name).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"{name}: BAGEL is loaded from a folder; download the weights first")
        check_memory(name, dtype or torch.bfloat16, torch.device(device))
        inferencer = load_inferencer(folder, code, device_map or {"": device}, dtype or torch.bfloat16)
        return cls(display_name(name), inferencer, **options)

    def text_ids(self, text: str) -> list[int]:
        """What the authors' `prepare_prompts` makes of a text: begin, words, end."""
        ends = self.inferencer.new_token_ids
        words = self.inferencer.tokenizer.encode(text)
        return [ends["bos_token_id"], *words, ends["eos_token_id"]]

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        rows = [self._drawing(s) if task == "generation" else self._reading(s) for s in samples]
        spans, extra = [row[:3] for row in rows], [row[3] for row in rows]
        return Batch.of_rows(spans, samples, task, extra).to(self.device)

    def _drawing(self, sample: Sample) -> tuple[list[int], list[int], list[int], dict[str, Any]]:
        prompt, ends, step = sample.turns[0][0], self.inferencer.new_token_ids, self.model.latent_downsample
        text = self.text_ids(prompt)
        latents = (self.image_shape[0] // step) * (self.image_shape[1] // step)
        ids = [*text, ends["start_of_image"], *[0] * latents, ends["end_of_image"]]
        queries = [*[0] * len(text), 0, *[1] * latents, 0]
        keys = [0, *[1] * (len(text) - 2), 0, *[0] * (latents + 2)]
        return ids, queries, keys, {"prompt": prompt}

    def _reading(self, sample: Sample) -> tuple[list[int], list[int], list[int], dict[str, Any]]:
        ends, patch = self.inferencer.new_token_ids, self.model.vit_patch_size
        ids: list[int] = []
        queries: list[int] = []
        keys: list[int] = []
        pictures = []
        for image in map(open_picture, sample.images):
            picture = self.inferencer.vae_transform.resize_transform(image)
            _, height, width = self.inferencer.vit_transform(picture).shape
            tokens = (height // patch) * (width // patch)
            ids += [ends["start_of_image"], *[0] * tokens, ends["end_of_image"]]
            queries += [0] * (tokens + 2)
            keys += [0, *[1] * tokens, 0]
            pictures.append(picture)
        for turn in sample.turns:
            for is_answer, text in enumerate(turn):
                piece = self.text_ids(text)
                ids += piece
                queries += [0, *[is_answer] * (len(piece) - 2), 0]
                keys += [0] * len(piece)
        return ids, queries, keys, {"pictures": pictures, "turns": sample.turns}

    def forward(self, batch: Batch) -> list[Any]:
        """Read (understanding) or draw (generation) every sample, one after the other."""
        on_gpu = self.device.type == "cuda"
        results = []
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            for self._now, (row, name) in enumerate(zip(batch.extra, batch.ids, strict=True)):
                if batch.task == "generation":
                    results.append(self._draw(row["prompt"], name))
                else:
                    results.append(self._read(row, int(batch.attention_mask[self._now].sum())))
        return results

    def _read(self, row: dict[str, Any], length: int) -> Any:
        context = self.inferencer.init_gen_context()
        for picture in row["pictures"]:
            context = self.inferencer.update_context_image(picture, context, vae=False)
        for turn in row["turns"]:
            for text in turn:
                context = self.inferencer.update_context_text(text, context)
        if context["kv_lens"][0] != length:
            raise AdapterError(
                f"{self.name}: expected {length} tokens, its code made {context['kv_lens'][0]}"
            )
        return context

    def _draw(self, prompt: str, name: str) -> Any:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(noise_seed(self.seed, name))
            context = self.inferencer.update_context_text(prompt, self.inferencer.init_gen_context())
            return self.inferencer.gen_image(
                self.image_shape,
                context,
                cfg_text_precontext=self.inferencer.init_gen_context(),  # guidance without the prompt
                cfg_img_precontext=context,
                num_timesteps=self.steps,
                **self.call,
            )

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[StepRecord]:
        record = StepRecord(len(self.layers()), batch.query_mask, batch.key_mask)

        def spans(query: Tensor, key: Tensor) -> CallSpans:
            """The call's queries are the newest tokens; its keys are all tokens so far."""
            n_query, n_key = query.shape[2], key.shape[2]
            if batch.task == "generation" and n_key != int(batch.attention_mask[self._now].sum()):
                return None  # reading the prompt, or the guidance pass without it
            queries = batch.query_mask[self._now, n_key - n_query : n_key]
            return torch.tensor([self._now]), queries[None], batch.key_mask[self._now, None, :n_key]

        layers: list[Any] = self.layers()
        with capture_sdpa([layer.self_attn for layer in layers], record, spans):
            yield record

    def visible(self, batch: Batch) -> Tensor:
        """Which keys each query sees: causal, and inside a drawn picture every token each other. [B, S, S]"""
        image = batch.query_mask & (batch.task == "generation")
        # The start and end tokens of the picture are read together with it.
        image = image | F.pad(image[:, 1:], (0, 1)) | F.pad(image[:, :-1], (1, 0))
        return causal_but_within(image, batch)

    def layers(self) -> list[nn.Module]:
        return list(self.model.language_model.model.layers)


# --- their code without flash-attn --------------------------------------------------------------------------


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    **_unused: Any,
) -> Tensor:
    """flash-attn's packed attention, sample by sample: q [T, H, D], k and v [T', Hk, D] -> [T, H, D].

    Causal means what it means there: the last query sees the last key.
    """
    out = []
    bounds = zip(
        cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:]
    )
    for q0, q1, k0, k1 in bounds:
        query, key, value = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        rows, columns = q1 - q0, k1 - k0
        mask = None
        if causal and rows > 1:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        out.append(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)[0].transpose(
                0, 1
            )
        )
    return torch.cat(out)


def load_inferencer(folder: Path, code: str | Path | None, device_map: Any, dtype: torch.dtype) -> Any:
    """The authors' model, tokenizer, transforms and VAE put together as their own demo does."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with _flash_attn_stood_in(), authors_code(str(folder), code, "inferencer", REPOSITORY) as inferencer:
        bagel = importlib.import_module("modeling.bagel")
        qwen2 = importlib.import_module("modeling.qwen2")
        autoencoder = importlib.import_module("modeling.autoencoder")
        data = importlib.import_module("data.data_utils")
        transforms = importlib.import_module("data.transforms")
        for part in ("qwen2_navit", "siglip_navit"):
            attention: Any = importlib.import_module(f"modeling.bagel.{part}")
            attention.flash_attn_varlen_func = varlen_attention

        text = bagel.Qwen2Config(**json.loads((folder / "llm_config.json").read_text()))
        text.qk_norm, text.tie_word_embeddings, text.layer_module = True, False, "Qwen2MoTDecoderLayer"
        vision = bagel.SiglipVisionConfig(**json.loads((folder / "vit_config.json").read_text()))
        vision.rope, vision.num_hidden_layers = False, vision.num_hidden_layers - 1
        vae, vae_config = autoencoder.load_ae(local_path=str(folder / "ae.safetensors"))
        config = bagel.BagelConfig(
            visual_gen=True,
            visual_und=True,
            llm_config=text,
            vit_config=vision,
            vae_config=vae_config,
            vit_max_num_patch_per_side=70,
            connector_act="gelu_pytorch_tanh",
            latent_patch_size=2,
            max_latent_size=64,
        )
        with init_empty_weights():
            model = bagel.Bagel(bagel.Qwen2ForCausalLM(text), bagel.SiglipVisionModel(vision), config)
            model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vision, meta=True)
        model = load_checkpoint_and_dispatch(
            model, str(folder / "ema.safetensors"), device_map=device_map, dtype=dtype
        ).eval()
        tokenizer, new_token_ids, _ = data.add_special_tokens(
            qwen2.Qwen2Tokenizer.from_pretrained(str(folder))
        )
        device = next(model.parameters()).device
        return inferencer.InterleaveInferencer(
            model,
            vae.to(device).eval(),
            tokenizer,
            transforms.ImageTransform(1024, 512, 16),
            transforms.ImageTransform(980, 224, 14),
            new_token_ids,
        )


@contextmanager
def _flash_attn_stood_in() -> Iterator[None]:
    """The authors' modules import flash_attn; where it is not installed, hand them our function."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_attention
    sys.modules["flash_attn"] = module
    try:
        yield
    finally:
        del sys.modules["flash_attn"]
