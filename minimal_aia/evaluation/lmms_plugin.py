"""The model plug-in of lmms-eval: any model that `load_adapter` loads, under the name "minimal_aia".

Found by lmms-eval through the entry-point group `lmms_eval.models`, so its own command works too:

    lmms-eval --model minimal_aia --model_args pretrained=weights/janus-pro-7b,dtype=bfloat16 --tasks mme
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm.auto import tqdm

from minimal_aia.evaluation.respond import respond
from minimal_aia.models import load_adapter
from minimal_aia.models.base import Adapter

# The harness's separator of few-shot examples is every task's default stop string; it would cut an answer
# after its first paragraph.
NO_STOP = "\n\n"


class MinimalAIA(lmms):
    """Greedy answers in batches. Arguments: those of `load_adapter`, and `batch_size`."""

    is_simple = False  # it takes messages with pictures, not text with pictures beside it

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        adapter: Adapter | None = None,
        max_batch_size: Any = None,  # the harness always passes it; there is no automatic batch size
        **options: Any,
    ) -> None:
        super().__init__()
        if adapter is None and not pretrained:
            raise ValueError("minimal_aia: say which model, pretrained=FOLDER")
        self.batch_size = int(batch_size)
        self.adapter = adapter or load_adapter(pretrained, device=device, **options)

    @property
    def device(self) -> torch.device:
        return self.adapter.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        # An argument tuple: (text, doc -> messages, generation settings, number of the doc, task, split).
        arguments = [request.args for request in requests]
        limits = [_limit(settings, task) for _, _, settings, _, task, _ in arguments]
        # Batches hold questions of like length, the longest first: too little memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: (-limits[i], -len(str(arguments[i][0])), i))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc=self.adapter.name, unit="question", disable=self.rank > 0) as bar:
            for limit, same in groupby(order, key=limits.__getitem__):
                rows = list(same)
                for first in range(0, len(rows), self.batch_size):
                    batch = rows[first : first + self.batch_size]
                    asked = [self._conversation(*arguments[i][1:]) for i in batch]
                    for i, text in zip(batch, respond(self.adapter, asked, limit), strict=True):
                        answers[i] = _cut(text, arguments[i][2].get("until"))
                    bar.update(len(batch))
        return answers

    def _conversation(self, to_messages: Any, _: Any, number: int, task: str, split: str) -> list[dict]:
        """The harness's messages, with opened pictures."""

        def part(p: dict[str, Any]) -> dict[str, Any]:
            if p["type"] == "text":
                return p
            if p["type"] != "image":
                raise ValueError(f"{task}: the plug-in reads text and still pictures, not {p['type']}")
            picture = p["url"] if isinstance(p["url"], Image.Image) else Image.open(p["url"])
            return {"type": "image", "image": picture}

        messages = to_messages(self.task_dict[task][split][number])
        return [{"role": m["role"], "content": [part(p) for p in m["content"]]} for m in messages]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("minimal_aia answers questions; it gives no log-likelihoods to lmms-eval")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("minimal_aia has no dialogues of several rounds with lmms-eval")


def _limit(settings: dict[str, Any], task: str) -> int:
    """Tokens an answer may have. Temperatures without `do_sample` mean nothing, here as in the library."""
    if settings.get("do_sample"):
        raise ValueError(f"{task} asks for sampled answers; the plug-in decodes greedily")
    return int(settings.get("max_new_tokens", 1024))


def _cut(text: str, until: str | list[str] | None) -> str:
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        if stop and stop != NO_STOP:
            text = text.split(stop)[0]
    return text.strip()
