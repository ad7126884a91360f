"""FLUX and Qwen-Image: text-to-image diffusion transformers of diffusers, generation only.

Text and image tokens form one joint sequence, text first, in every layer, and every token sees every other.
There is no target image to force: the pipeline itself denoises from noise (seeded by the sample's id), and
the intensity of a layer is the average over all denoising steps. Passes for the negative prompt are not
counted. Keys are the prompt's own tokens in the encoder that feeds the joint sequence (T5 for FLUX), without
end token and padding, although FLUX lets the image attend to the padding too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.base import Adapter, Batch
from minimal_aia.models.draw import noise_seed
from minimal_aia.models.loading import check_memory, default_device, display_name, require
from minimal_aia.models.records import CallSpans, StepRecord, capture_sdpa
from minimal_aia.models.text import require_offsets, token_mask

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.registry import Family


class DiffusionAdapter(Adapter):
    """What both pipelines share. `layers()` are the blocks with joint attention, in the order they run.

    Options of `load_adapter`: `steps` (denoising steps; default: the pipeline's), `height` and `width` in
    pixels (default: the pipeline's), `seed`, and `call`, a dict of further arguments for the pipeline's call.
    """

    tasks = ("generation",)

    def __init__(
        self,
        name: str,
        pipeline: Any,
        family: str,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        call: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name, pipeline.transformer)
        self.pipeline, self.family, self.seed = pipeline, family, seed
        pipeline.set_progress_bar_config(disable=True)
        default = pipeline.default_sample_size * pipeline.vae_scale_factor
        self.height, self.width = height or default, width or default
        self.call = {**self.usual(), **({"num_inference_steps": steps} if steps else {}), **(call or {})}
        require_offsets(self.prompt_tokenizer, name)

    @classmethod
    def load(
        cls,
        name: str,
        family: Family,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        load_in_4bit: bool = False,
        **options: Any,
    ) -> DiffusionAdapter:
        import diffusers

        device = device or default_device()
        check_memory(name, dtype, None if device_map else torch.device(device), load_in_4bit)
        loading: dict[str, Any] = {"torch_dtype": dtype} if dtype else {}
        if load_in_4bit:
            require("bitsandbytes", f"{name} with load_in_4bit=True")
            loading["quantization_config"] = diffusers.PipelineQuantizationConfig(
                quant_backend="bitsandbytes_4bit",
                quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                components_to_quantize=["transformer"],
            )
        if device_map is not None:
            loading["device_map"] = device_map
        pipeline = getattr(diffusers, family.model).from_pretrained(name, use_safetensors=True, **loading)
        if device_map is None:
            pipeline.to(device)
        return cls(display_name(name), pipeline, family.name, **options)

    @property
    def prompt_tokenizer(self) -> Any:
        """The tokenizer whose tokens enter the joint sequence."""
        return self.pipeline.tokenizer

    def usual(self) -> dict[str, Any]:
        """Arguments of the pipeline's call as its authors recommend them, where its own defaults differ."""
        return {}

    def text_spans(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, T] of the text part of the sequence, its prompt tokens and its real tokens, bool [B, T]."""
        raise NotImplementedError

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The prompts as the pipeline's call takes them; "prompt_embeds" is [B, T, D]."""
        raise NotImplementedError

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        prompts = [sample.turns[0][0] for sample in samples]
        ids, words, real = self.text_spans(prompts)
        side = self.pipeline.vae_scale_factor * 2
        image = torch.ones(len(samples), (self.height // side) * (self.width // side), dtype=torch.bool)
        return Batch(
            inputs={"input_ids": ids},
            query_mask=torch.cat([torch.zeros_like(words), image], 1),
            key_mask=torch.cat([words, ~image], 1),
            attention_mask=torch.cat([real, image], 1).long(),
            ids=[sample.id for sample in samples],
            task=task,
            extra=[{"prompt": prompt} for prompt in prompts],
        ).to(self.device)

    def visible(self, batch: Batch) -> Tensor:
        """Which keys each query sees: all real ones. bool [B, S, S]"""
        real = batch.attention_mask.bool()
        return real[:, None, :].expand(-1, real.shape[1], -1)

    def forward(self, batch: Batch) -> Any:
        """The whole denoising run; returns the final latents (nothing is decoded)."""
        generators = [torch.Generator("cpu").manual_seed(noise_seed(self.seed, name)) for name in batch.ids]
        with torch.no_grad():
            self._positive = self.encode([row["prompt"] for row in batch.extra])
            return self.pipeline(
                **self._positive,
                height=self.height,
                width=self.width,
                generator=generators,
                output_type="latent",
                **self.call,
            ).images

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[StepRecord]:
        record = StepRecord(len(self.layers()), batch.query_mask, batch.key_mask)
        counted = False

        def look(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal counted
            text, prompt = kwargs["encoder_hidden_states"], self._positive["prompt_embeds"]
            counted = text.shape == prompt.shape and torch.equal(text, prompt)

        def spans(query: Tensor, _key: Tensor) -> CallSpans:
            return (torch.arange(len(batch)), batch.query_mask, batch.key_mask) if counted else None

        hook = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            attention: list[Any] = [block.attn for block in self.layers()]
            with capture_sdpa(attention, record, spans):
                yield record
        finally:
            hook.remove()


class FluxAdapter(DiffusionAdapter):
    """FLUX.1 dev and schnell (`FluxPipeline`): 19 double-stream blocks, then 38 single-stream blocks."""

    def usual(self) -> dict[str, Any]:
        if self.model.config.guidance_embeds:  # dev
            return {}
        return {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}  # schnell

    @property
    def prompt_tokenizer(self) -> Any:
        return self.pipeline.tokenizer_2

    def text_spans(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.prompt_tokenizer(
            prompts,
            padding="max_length",
            max_length=self.call.get("max_sequence_length", 512),
            truncation=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        ids = tokens["input_ids"]
        words = token_mask(tokens["offset_mapping"], [[(0, len(p))] for p in prompts])
        # FLUX passes no mask: padding tokens take part in attention like any other.
        return ids, words & tokens["attention_mask"].bool(), torch.ones_like(ids, dtype=torch.bool)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        length = self.call.get("max_sequence_length", 512)
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def layers(self) -> list[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]


class QwenImageAdapter(DiffusionAdapter):
    """Qwen-Image (`QwenImagePipeline`): 60 joint blocks; the pipeline cuts off the chat template's head."""

    def usual(self) -> dict[str, Any]:
        return {"negative_prompt": " ", "true_cfg_scale": 4.0}

    def text_spans(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        template, cut = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        front = template.index("{}")
        tokens = self.prompt_tokenizer(
            [template.format(p) for p in prompts],
            max_length=self.pipeline.tokenizer_max_length + cut,
            padding=True,
            padding_side="right",
            truncation=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        real = tokens["attention_mask"].bool()[:, cut:]
        words = token_mask(tokens["offset_mapping"], [[(front, front + len(p))] for p in prompts])[:, cut:]
        return tokens["input_ids"][:, cut:], words & real, real

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(prompts)
        return {"prompt_embeds": embeds, **({} if mask is None else {"prompt_embeds_mask": mask})}

    def layers(self) -> list[nn.Module]:
        return list(self.model.transformer_blocks)
