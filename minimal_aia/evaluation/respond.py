"""Greedy answers to questions about pictures, many at a time: what an understanding harness asks of a model.

Prompts of a batch are padded on the left, so that all answers begin at the same place; the library's
`generate` decodes with its key-value cache and gives every row its own positions. An answer does not depend
on its batch (in half precision on a GPU, up to the last digits of its logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from minimal_aia.models.base import Adapter, AdapterError, Batch

# A list of {"role": "user", "content": [part, ...]}. A part is {"type": "text", "text": str} or
# {"type": "image", "image": PIL.Image}, in the order in which the model is to read them.
Conversation = Sequence[dict[str, Any]]


def respond(adapter: Adapter, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
    """One greedy answer, stripped, for each conversation.

    Raises AdapterError if the family cannot answer here, or a lab model is asked about something outside its
    world; MemoryError if the batch does not fit.
    """
    from minimal_aia.models.chat import ChatAdapter
    from minimal_aia.models.lab import LabAdapter

    if "understanding" not in adapter.tasks or not isinstance(adapter, ChatAdapter | LabAdapter):
        raise AdapterError(
            f"{adapter.name}: a {adapter.family} model with the tasks {' and '.join(adapter.tasks)} cannot "
            "answer questions here"
        )
    answer = _lab if isinstance(adapter, LabAdapter) else _chat
    answers = [""] * len(conversations)
    # Processors take pictures for all of a batch or for none of it.
    for seen in (True, False):
        rows = [i for i, c in enumerate(conversations) if bool(pictures_of(c)) == seen]
        if not rows:
            continue
        try:
            with torch.inference_mode():
                found = answer(adapter, [conversations[i] for i in rows], max_new_tokens)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"out of memory answering {len(rows)} at a time; use a smaller batch"
            ) from error
        for i, text in zip(rows, found, strict=True):
            answers[i] = text.strip()
    return answers


def pictures_of(conversation: Conversation) -> list[Image.Image]:
    """Its pictures, in order."""
    parts = [part for message in conversation for part in message["content"]]
    return [part["image"].convert("RGB") for part in parts if part["type"] == "image"]


def _chat(adapter: Any, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
    def part(p: dict[str, Any]) -> dict[str, Any]:
        if p["type"] == "image":
            return {"type": "image"}
        # Spelled out in a question, the placeholder would be taken for a picture that is not there.
        return {"type": "text", "text": p["text"].replace(adapter.image_token, "")}

    texts = [
        adapter.chat(
            [{"role": m["role"], "content": [part(p) for p in m["content"]]} for m in conversation],
            add_generation_prompt=True,
        )
        for conversation in conversations
    ]
    images = [pictures_of(c) for c in conversations]
    made = adapter.processor(
        text=texts,
        images=images if images[0] else None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    known = adapter.accepted_inputs()
    mask = made["attention_mask"]
    batch = Batch(
        {k: v for k, v in made.items() if k in known}, mask, mask, mask, [], task="understanding"
    ).to(adapter.device, adapter.dtype)
    inputs = batch.inputs
    if adapter.family == "emu3" and "pixel_values" in inputs:
        # The library encodes a padded batch of pictures, and padding changes their codes: one by one here.
        inputs = {"input_ids": adapter.token_ids(batch), "attention_mask": inputs["attention_mask"]}
    eos = adapter.model.generation_config.eos_token_id
    out = adapter.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=adapter.tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=adapter.tokenizer.pad_token_id,
        use_cache=True,
    )
    # Rows that ended are filled up with padding, a special token.
    return adapter.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _lab(adapter: Any, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
    """One 24x24 picture and one question of known words a conversation, by the lab's own loop."""
    from minimal_aia.evaluation.subjects import LabModel

    questions, seen = [], []
    for conversation in conversations:
        text = " ".join(p["text"] for m in conversation for p in m["content"] if p["type"] == "text").strip()
        if reason := adapter.bad_text(text):
            raise AdapterError(f"{adapter.name}: {reason}")
        pictures = pictures_of(conversation)
        if len(conversation) != 1 or [p.size for p in pictures] != [(24, 24)]:
            raise AdapterError(f"{adapter.name}: a lab model answers one question about one 24x24 picture")
        questions.append(text)
        seen.append(np.asarray(pictures[0]))
    model = LabModel(adapter.name, 0, adapter.tasks, adapter.model, adapter.codebook)
    return [" ".join(words.split()[:max_new_tokens]) for words in model.answer(np.stack(seen), questions)]
