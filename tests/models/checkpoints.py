"""Tiny random checkpoints in the real layout of each family, written to a folder.

Model, tokenizer, image processor and chat template are saved with `save_pretrained`, so that the adapters
load them exactly as they would load the real ones. The chat templates follow the families' published
formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minimal_aia.models.loading import images_only

CORPUS = [
    "a red circle and two blue squares on a white wall, the sign says hello world",
    "what colour is the circle? how many squares are there? describe the picture.",
    "The circle is red. There are two squares. It is a large house near the sea.",
    "User: Assistant: USER: ASSISTANT: system user assistant\n\n",
]


@cache
def bpe() -> Tokenizer:
    """A small byte-level BPE: all 256 bytes and some merges, so that words are one to several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def vocabulary(folder: Path) -> dict[str, Any]:
    """vocab and merges as the Qwen and GPT-2 tokenizer classes take them."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = (Path(p) for p in bpe().model.save(str(folder)))
    pairs = [tuple(line.split(" ")) for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
    return {"vocab": json.loads(vocab.read_text(encoding="utf-8")), "merges": pairs}


def qwen_tokenizer(folder: Path, special: list[str], **names: str) -> Any:
    """Qwen2's tokenizer class with ChatML markers; `names` become attributes such as `image_token`."""
    tokenizer = transformers.Qwen2Tokenizer(
        **vocabulary(folder),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    tokenizer.add_tokens(["<|im_start|>", *special], special_tokens=True)
    return tokenizer


def llama_like_tokenizer(special: list[str], bos: str, eos: str, pad: str, **names: str) -> Any:
    """A tokenizer.json with a byte-level BPE, which is what DeepSeek's and Chameleon's Llama tokenizers
    are."""
    backend = Tokenizer.from_str(bpe().to_str())
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        sep_token=names.pop("sep_token", None),
        extra_special_tokens=names,
    )
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def save(folder: Path, processor: Any, config: Any, model_class: str) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():  # attention far from flat, and biases that are not zero, make a sharper test
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
            elif parameter_name.endswith(".bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen_processor(folder: Path, cls: str, patch: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": 16 * patch**2, "longest_edge": 64 * patch**2}
    )
    template = (
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML.replace("IMAGE", QWEN_IMAGE)
    )
    return images_only(getattr(transformers, cls))(
        images, qwen_tokenizer(folder, special), chat_template=template
    )


def qwen_ids(processor: Any) -> dict[str, int]:
    ids = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def qwen2_5_vl(folder: Path) -> Path:
    processor = qwen_processor(folder, "Qwen2_5_VLProcessor", patch=4)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(processor.tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        **qwen_ids(processor),
    )
    return save(folder, processor, config, "Qwen2_5_VLForConditionalGeneration")


def qwen3_vl(folder: Path, moe: bool = False) -> Path:
    processor = qwen_processor(folder, "Qwen3VLProcessor", patch=4)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if moe else {}
    config = getattr(transformers, "Qwen3VLMoeConfig" if moe else "Qwen3VLConfig")(
        text_config={
            **TEXT,
            **experts,
            "vocab_size": len(processor.tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **qwen_ids(processor),
    )
    return save(folder, processor, config, f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration")


def qwen3_vl_moe(folder: Path) -> Path:
    return qwen3_vl(folder, moe=True)


QWEN2_TEXT = {**{k: v for k, v in TEXT.items() if k != "head_dim"}, "model_type": "qwen2"}


def internvl(folder: Path) -> Path:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = qwen_tokenizer(folder, list(names.values()), **names)
    images = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = images_only(transformers.InternVLProcessor)(
        images, tokenizer, image_seq_length=4, chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    )
    config = transformers.InternVLConfig(
        text_config={**QWEN2_TEXT, "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return save(folder, processor, config, "InternVLForConditionalGeneration")


def llava_onevision(folder: Path) -> Path:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = qwen_tokenizer(folder, ["<image>", "<video>"])
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=grid)
    processor = images_only(transformers.LlavaOnevisionProcessor)(
        images,
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    config = transformers.LlavaOnevisionConfig(
        text_config={**QWEN2_TEXT, "vocab_size": len(tokenizer)},
        vision_config={**SIGLIP, "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return save(folder, processor, config, "LlavaOnevisionForConditionalGeneration")


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LLAMA_TEXT = {**TEXT, "model_type": "llama"}
DEEPSEEK_SPECIAL = ["<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"]


def deepseek_tokenizer() -> Any:
    return llama_like_tokenizer(
        DEEPSEEK_SPECIAL,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )


def deepseek_template(user: str, assistant: str) -> str:
    """DeepSeek's two-separator format: a blank line after the user, end-of-sentence after the assistant."""
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + user + ": {% else %}" + assistant + ": {% endif %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image_placeholder>\n"
        "{% else %}{{ part['text'].strip() }}{% endif %}{% endfor %}"
        "{% if not loop.last or add_generation_prompt %}"
        "{% if message['role'] == 'user' %}{{ '\\n\\n' }}"
        "{% else %}<｜end▁of▁sentence｜>{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + assistant + ":{% endif %}"
    )


def deepseek_vl(folder: Path) -> Path:
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

    tokenizer = deepseek_tokenizer()
    images = DeepseekVLImageProcessorPil(size={"height": 16, "width": 16}, min_size=4)
    processor = transformers.DeepseekVLProcessor(
        images, tokenizer, num_image_tokens=16, chat_template=deepseek_template("User", "Assistant")
    )
    config = transformers.DeepseekVLConfig(
        text_config={**LLAMA_TEXT, "vocab_size": len(tokenizer)},
        vision_config=SIGLIP,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return save(folder, processor, config, "DeepseekVLForConditionalGeneration")


def janus(folder: Path) -> Path:
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    tokenizer = deepseek_tokenizer()
    images = JanusImageProcessorPil(size={"height": 16, "width": 16}, min_size=4)
    processor = transformers.JanusProcessor(
        images,
        tokenizer,
        num_image_tokens=16,
        use_default_system_prompt=True,
        chat_template=deepseek_template("<|User|>", "<|Assistant|>"),
    )
    vision = {k: v for k, v in SIGLIP.items() if k not in ("model_type", "intermediate_size")}
    config = transformers.JanusConfig(
        text_config={**LLAMA_TEXT, "vocab_size": len(tokenizer)},
        vision_config={**vision, "projection_dim": 32, "num_image_tokens": 16},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 32,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return save(folder, processor, config, "JanusForConditionalGeneration")


def emu3(folder: Path) -> Path:
    visual = [f"<|visual token {i:06d}|>" for i in range(32)]
    names = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    tokenizer = transformers.GPT2Tokenizer(
        **vocabulary(folder),
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    tokenizer.add_tokens(["<|extra_200|>", *names.values(), *visual], special_tokens=True)
    template = (
        "{% for message in messages %}{{ message['role'].upper() }}: "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    images = transformers.Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=32 * 48, spatial_factor=8)
    processor = transformers.Emu3Processor(images, tokenizer, chat_template=template)
    config = transformers.Emu3Config(
        text_config={
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vq_config={
            "codebook_size": 32,
            "temporal_downsample_factor": 1,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map={
            token: tokenizer.convert_tokens_to_ids(token) for token in ["<image>", "<|extra_200|>", *visual]
        },
    )
    return save(folder, processor, config, "Emu3ForConditionalGeneration")


def chameleon(folder: Path) -> Path:
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    codes = [f"IMGIMG{chr(ord('A') + i // 10)}{chr(ord('A') + i % 10)}Z" for i in range(32)]
    names = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    tokenizer = llama_like_tokenizer(
        [*names.values(), *codes], bos="<s>", eos="</s>", pad="<pad>", sep_token="<reserved08706>", **names
    )
    images = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.ChameleonProcessor(images, tokenizer, image_seq_length=16)
    config = transformers.ChameleonConfig(
        **{k: v for k, v in TEXT.items() if k != "head_dim"},
        vocab_size=len(tokenizer),
        vq_config={
            "embed_dim": 16,
            "num_embeddings": 32,
            "latent_channels": 16,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={token: tokenizer.convert_tokens_to_ids(token) for token in ["<image>", *codes]},
    )
    return save(folder, processor, config, "ChameleonForConditionalGeneration")


def simplear(folder: Path, n_codes: int = 32) -> Path:
    tokenizer = qwen_tokenizer(folder, ["<|t2i|>", "<|soi|>"])
    config = transformers.Qwen2Config(
        **{k: v for k, v in QWEN2_TEXT.items() if k != "model_type"}, vocab_size=len(tokenizer) + n_codes
    )
    return save(folder, tokenizer, config, "Qwen2ForCausalLM")


MAKERS: dict[str, Callable[[Path], Path]] = {
    "janus": janus,
    "emu3": emu3,
    "chameleon": chameleon,
    "simplear": simplear,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "qwen3-vl-moe": qwen3_vl_moe,
    "internvl": internvl,
    "llava-onevision": llava_onevision,
    "deepseek-vl": deepseek_vl,
}
