"""The lab's models, all real transformers classes: how to build them, run them and draw with them.

unified         one Llama for both tasks, pictures as tokens of its vocabulary (as Emu3)
janus           a JanusForConditionalGeneration: own vision encoder for reading, codes for drawing
mot             a mixture of transformers: an expert for the codes being drawn, one for the rest (as BAGEL)
generation      the same Llama, trained on drawing only
understanding   the same Llama, trained on answering only
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from minimal_aia.lab import images, scenes
from minimal_aia.lab.mot import MotConfig, MotForCausalLM
from minimal_aia.lab.sequences import (
    BOI,
    BOS,
    EOS,
    FIRST_CODE,
    IMAGE,
    PAD,
    SPECIAL,
    VOCABULARY,
    WORDS,
    Sequences,
    word_ids,
)
from minimal_aia.models.tensor_files import read_json

NAMES = ("unified", "janus", "mot", "generation", "understanding")
TASKS = {
    "unified": ("generation", "understanding"),
    "janus": ("generation", "understanding"),
    "mot": ("generation", "understanding"),
    "generation": ("generation",),
    "understanding": ("understanding",),
}
WIDTH = 64
# Width, layers, heads. "small" is for a GPU: 32 million parameters (mot: twice that), the same world.
SCALES = {"laptop": (WIDTH, 8, 4), "small": (512, 12, 8)}
# About 1/sqrt(width): with the usual 0.02, attention this narrow starts flat and needs thousands of steps to
# find the picture (measured at width 64: understanding loss .52 against .26 after 800 steps).
INIT = 0.1
FROZEN = ("vqmodel", "vision_model")  # the parts of the Janus-like model that are trained beforehand
VQ_DIM = 16  # width of a code in the Janus image tokenizer


def _text_config(
    vocabulary: int, kind: type[LlamaConfig] = LlamaConfig, scale: str = "laptop", **more: int
) -> Any:
    width, layers, heads = SCALES[scale]
    return kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        initializer_range=INIT * (WIDTH / width) ** 0.5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **more,
    )


def build(
    name: str, seed: int = 0, parts: dict[str, nn.Module] | None = None, scale: str = "laptop"
) -> PreTrainedModel:
    """An untrained lab model. `parts`: pretrained `vqmodel` and `vision_model` to freeze inside `janus`.

    scale: a key of `SCALES`. Raises ValueError for an unknown name or scale, and for a Janus-like model of
    another scale than the laptop's: its vision encoder comes in one size.
    """
    torch.manual_seed(seed)
    if name not in NAMES:
        raise ValueError(f"unknown lab model {name!r}: one of {', '.join(NAMES)}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: one of {', '.join(SCALES)}")
    if name == "mot":
        marks = {"first_word_id": len(SPECIAL), "first_code_id": FIRST_CODE}
        return MotForCausalLM(_text_config(VOCABULARY, MotConfig, scale, **marks))
    if name != "janus":
        return LlamaForCausalLM(_text_config(VOCABULARY, scale=scale))
    if scale != "laptop":
        raise ValueError(f"the Janus-like lab model comes in laptop scale only, not {scale!r}")
    heads = SCALES[scale][2]
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "mlp_ratio": 2.0,
        "patch_size": images.PATCH,
        "image_size": scenes.IMAGE_SIZE,
        "num_image_tokens": images.N_IMAGE_TOKENS,
        "projection_dim": WIDTH,
        "depth": 2,
        "initializer_range": INIT,
    }
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=_text_config(len(WORDS)),
            vision_config=vision,
            vq_config=vq_config(),
            image_token_id=IMAGE,
        )
    )
    for part, trained in (parts or {}).items():
        getattr(model.model, part).load_state_dict(trained.state_dict())
    freeze(model)
    return model


def freeze(model: Any) -> None:
    """Keep the pretrained parts of a Janus-like model as they are; call again after `model.train()`."""
    for part in FROZEN:
        getattr(model.model, part).requires_grad_(False).eval()


def vq_config() -> dict:
    """The image tokenizer of the Janus-like model: 24x24 pixels to 6x6 codes."""
    return {
        "embed_dim": VQ_DIM,
        "num_embeddings": images.N_CODES,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "num_patches": images.GRID,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }


def is_janus(model: Any) -> bool:
    return isinstance(model, JanusForConditionalGeneration)


def routed(model: Any, drawn: Tensor) -> dict[str, Tensor]:
    """What a mixture of transformers is told besides its tokens: which are being drawn, bool `[B, S]`."""
    return {"generation_mask": drawn} if isinstance(model, MotForCausalLM) else {}


def embed(model: Any, batch: Sequences, task: str) -> Tensor:
    """Input embeddings `[B, S, D]`: words, and for a Janus-like model's picture whatever this task uses."""
    if not is_janus(model):
        return model.get_input_embeddings()(batch.ids)
    is_code = batch.ids >= FIRST_CODE
    embeds = model.get_input_embeddings()(batch.ids.masked_fill(is_code, IMAGE))
    if task == "understanding":
        picture = model.model.get_image_features(batch.pixels, return_dict=True).pooler_output
    else:
        picture = model.prepare_embeddings_for_image_generation(batch.ids[is_code] - FIRST_CODE)
    return embeds.masked_scatter(is_code[..., None], picture.reshape(-1, embeds.shape[-1]))


def label_logits(model: Any, batch: Sequences, task: str) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits at the positions that predict labels, `[N, V]`, and the labels, `[N]`.

    Padding is on the right and attention is causal, so no real token can see any: no mask is needed.
    """
    wanted = batch.label_mask[:, 1:]
    labels = batch.ids[:, 1:][wanted]
    if not is_janus(model):
        drawn = (batch.ids >= FIRST_CODE) & (task == "generation")
        hidden = model.model(input_ids=batch.ids, use_cache=False, **routed(model, drawn)).last_hidden_state
        return model.lm_head(hidden[:, :-1][wanted]), labels
    hidden = model.model.language_model(
        inputs_embeds=embed(model, batch, task), use_cache=False
    ).last_hidden_state
    if task == "understanding":
        return model.lm_head(hidden[:, :-1][wanted]), labels
    return model.model.generation_head(hidden[:, :-1][wanted]), labels - FIRST_CODE


def next_token_loss(model: Any, batch: Sequences, task: str) -> Tensor:
    """Mean cross-entropy in nats a label token."""
    return nn.functional.cross_entropy(*label_logits(model, batch, task))


@torch.no_grad()
def draw(model: Any, prompts: list[str], seed: int = 0, temperature: float = 1.0) -> np.ndarray:
    """Sample a picture for every prompt: codes, int64 `[N, 36]`. No guidance; one batch a prompt length."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = [[BOS, *word_ids(p), BOI] for p in prompts]
    codes = np.empty((len(prompts), images.N_IMAGE_TOKENS), dtype=np.int64)
    for length in sorted({len(t) for t in tokens}):
        rows = [i for i, t in enumerate(tokens) if len(t) == length]
        embeds = model.get_input_embeddings()(torch.tensor([tokens[i] for i in rows], device=device))
        decoder = model.model.language_model if is_janus(model) else model.model
        cache, drawn = None, []
        for step in range(images.N_IMAGE_TOKENS):
            extra = routed(model, torch.full(embeds.shape[:2], step > 0, device=device))
            out = decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **extra)
            cache, last = out.past_key_values, out.last_hidden_state[:, -1]
            logits = (
                model.model.generation_head(last) if is_janus(model) else model.lm_head(last)[:, FIRST_CODE:]
            )
            probs = (logits / temperature).softmax(-1)
            code = torch.multinomial(probs, 1, generator=generator)
            drawn.append(code)
            if is_janus(model):
                embeds = model.prepare_embeddings_for_image_generation(code)
            else:
                embeds = model.get_input_embeddings()(code + FIRST_CODE)
        codes[rows] = torch.cat(drawn, dim=1).cpu().numpy()
    return codes


def tokenizer(with_codes: bool) -> PreTrainedTokenizerFast:
    """The lab's words (and, for models that need them, one token an image code) in Hugging Face format."""
    words = [*WORDS, *(f"<code_{c}>" for c in range(images.N_CODES))] if with_codes else list(WORDS)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{n}_token": f"<{n}>" for n in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        extra_special_tokens=["<boi>", "<eoi>", "<image>"],
        padding_side="right",
        **names,
    )


def save(model: PreTrainedModel, codebook: np.ndarray, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads, with the tokenizer and the picture codebook beside it."""
    model.save_pretrained(folder)
    tokenizer(with_codes=not is_janus(model)).save_pretrained(folder)
    save_file({"codebook": codebook}, folder / "codebook.safetensors")


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars and reports of transformers: small models load at once, and what is missing we say."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load(folder: Path | str) -> tuple[PreTrainedModel, np.ndarray]:
    """A saved lab model in evaluation mode, and its picture codebook; ValueError or OSError if damaged."""
    folder = Path(folder)
    codebook = folder / "codebook.safetensors"
    if not codebook.is_file():
        raise FileNotFoundError(f"{folder} is no lab model: {codebook.name} is missing")
    kind: Any = AutoModelForCausalLM
    if read_json(folder / "config.json").get("model_type") == "janus":
        kind = JanusForConditionalGeneration
    try:
        colours = load_file(codebook)["codebook"]
        with without_bars():
            model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: a weight file is damaged ({reason}); copy or train it again") from error
    if missing := sorted(info["missing_keys"]):  # the library would go on with random numbers
        raise ValueError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model.eval(), colours
