"""Tokenizer, image processor and generation settings of Janus in its two layouts.

The original folder has a tokenizer.json and the settings of DeepSeek's own processor classes
(`VLChatProcessor`, `VLMImageProcessor`; facts from `janus/models/{processing_vlm,image_processing_vlm}.py`
and `janus/utils/conversation.py`); Hugging Face wants a `JanusProcessor`. Files that a folder has in the
wanted layout already are copied as they are, which loses nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from minimal_aia.models.tensor_files import read_json, write_json

# Everything small that lies beside weights, in either layout.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
PICTURES = ("min_size", "image_mean", "image_std", "rescale_factor", "do_normalize")
SPECIAL = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
PAD = "<｜▁pad▁｜>"
# The conversation format of DeepSeek's processor (`sft_format: deepseek`): turns end in a blank line or the
# end-of-sentence token, an image's placeholder stands on a line of its own.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- set user = message['role']|lower == 'user' -%}"
    "{%- if user -%}<|User|>{%- elif message['role']|lower == 'assistant' -%}<|Assistant|>"
    "{%- else -%}{{ message['role']|capitalize }}{%- endif -%}{{ ': ' }}"
    "{%- if message['content'] is string -%}{{ message['content']|trim }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}<image_placeholder>"
    "{%- if not loop.last and message['content'][loop.index]['type'] != 'image' -%}{{ '\\n' }}{%- endif -%}"
    "{%- else -%}{%- if not loop.first and message['content'][loop.index0 - 1]['type'] == 'text' -%}{{ ' ' }}"
    "{%- endif -%}{{ part['text']|trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if not user -%}{{ eos_token }}"
    "{%- elif not loop.last or add_generation_prompt -%}{{ '\\n\\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|Assistant|>:{%- endif -%}"
)


def copy_files(source: Path, out: Path, skip: tuple[str, ...] = ()) -> None:
    """Copy the small files of a checkpoint folder, byte for byte."""
    for name in FILES:
        if name not in skip and (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def has_processor(folder: Path, cls: str) -> bool:
    """Whether a folder holds a tokenizer and processor class `cls` (`JanusProcessor`, `VLChatProcessor`)."""
    settings = folder / "processor_config.json"
    if not (folder / "tokenizer.json").is_file() or not settings.is_file():
        return False
    return bool(read_json(settings).get("processor_class") == cls)


def write_hf_processor(source: Path, out: Path, config: Any) -> None:
    """Make a `JanusProcessor` from an original folder's files; save it and generation_config.json into `out`.

    config: the `JanusConfig`; its image token is set to the tokenizer's.
    Raises ValueError if the vocabulary lacks one of Janus' special tokens: a new id would be a guess.
    """
    from tokenizers import Tokenizer, processors
    from transformers import GenerationConfig, JanusProcessor, PreTrainedTokenizerFast
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    def settings(name: str) -> dict[str, Any]:
        return read_json(source / name) if (source / name).is_file() else {}

    if (style := settings("processor_config.json").get("sft_format", "deepseek")) != "deepseek":
        raise ValueError(
            f"{source}: its chat format {style!r} is not known here (only deepseek); give --config, a "
            "Hugging Face folder with a processor"
        )
    file = source / "tokenizer.json"
    known = Tokenizer.from_file(str(file))
    if lacking := [token for token in (*SPECIAL.values(), PAD) if known.token_to_id(token) is None]:
        raise ValueError(f"{file}: not a Janus tokenizer, it lacks {', '.join(lacking)}")
    # Not the class that the folder names: Llama's would rebuild the byte-level tokenizer of tokenizer.json.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, extra_special_tokens=SPECIAL)
    tokenizer.pad_token = PAD
    bos, added = tokenizer.bos_token, settings("tokenizer_config.json").get("add_bos_token", True)
    if bos and added and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        # The original class adds it whatever tokenizer.json says.
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    pictures = settings("preprocessor_config.json")
    size = pictures.pop("image_size", config.vision_config.image_size)
    kept = {key: pictures[key] for key in PICTURES if key in pictures}
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": size, "width": size}, **kept),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        use_default_system_prompt=True,
        num_image_tokens=config.vision_config.num_image_tokens,
    )
    processor.save_pretrained(out)
    config.image_token_id = known.token_to_id(SPECIAL["image_token"])
    GenerationConfig(  # as Janus' `generate` needs it, with the guidance of DeepSeek's script
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": known.token_to_id(SPECIAL["boi_token"])},
    ).save_pretrained(out)


def write_original_processor(source: Path, out: Path, config: Any) -> bool:
    """From a Hugging Face folder's processor the files that DeepSeek's classes read; False if it has none."""
    if not has_processor(source, "JanusProcessor"):
        return False
    processor = read_json(source / "processor_config.json")
    # transformers 5 keeps the picture's settings inside.
    pictures = processor.get("image_processor") or read_json(source / "preprocessor_config.json")
    tokenizer = read_json(source / "tokenizer_config.json")
    names = {key: tokenizer.get(key) for key in ("bos_token", "eos_token", "pad_token")}
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    write_json(
        out / "tokenizer_config.json",
        {
            **names,
            "add_bos_token": True,
            "add_eos_token": False,
            "model_max_length": tokenizer.get("model_max_length", config.text_config.max_position_embeddings),
            "tokenizer_class": "LlamaTokenizerFast",
        },
    )
    write_json(
        out / "special_tokens_map.json", {**names, "additional_special_tokens": list(SPECIAL.values())}
    )
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "VLMImageProcessor",
            "processor_class": "VLChatProcessor",
            "image_size": pictures["size"]["height"],
            **{key: pictures[key] for key in PICTURES if key in pictures},
        },
    )
    write_json(
        out / "processor_config.json",
        {
            "processor_class": "VLChatProcessor",
            "image_tag": SPECIAL["image_token"],
            "num_image_tokens": processor.get("num_image_tokens", config.vision_config.num_image_tokens),
            "sft_format": "deepseek",
            "add_special_token": False,
            "mask_prompt": True,
            "ignore_id": -100,
        },
    )
    return True
