"""A tiny random Llama behind the adapter protocol, and Eq. 1 from its eager attention as an independent
oracle."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minimal_aia.data import Sample
from minimal_aia.models.base import Adapter, Batch

N_LAYERS, N_HEADS, N_IMAGE = 3, 4, 6
BOS, IMAGE_START = 1, 2


def tiny_llama(seed: int = 0, attn: str = "sdpa") -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,  # large, so that attention is far from flat
        attn_implementation=attn,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def word_ids(text: str) -> list[int]:
    return [3 + sum(word.encode()) % 40 for word in text.split()]


class FakeAdapter(Adapter):
    """Words and image tokens in one vocabulary; knows no sample with the word "unknown" in it."""

    family = "fake"
    tasks = ("generation", "understanding")

    def __init__(
        self, model=None, name: str = "fake/tiny", left_padding: bool = False, stop_after: int | None = None
    ):
        super().__init__(name, model or tiny_llama())
        self.left_padding, self.stop_after = left_padding, stop_after
        self.n_forward, self.sizes = 0, []

    def why_not(self, sample, task):
        if "unknown" in " ".join(q + a for q, a in sample.turns):
            return "a word the model does not know"
        return super().why_not(sample, task)

    def row(self, sample, task):
        """ids, query, key of one sample."""
        image = [43 + (sum(sample.id.encode()) + i) % 20 for i in range(N_IMAGE)]
        if task == "generation":
            text = word_ids(sample.turns[0][0]) if "dropped" not in sample.type else []
            ids = [BOS, *text, IMAGE_START, *image]
            key = [False, *[True] * len(text), False, *[False] * N_IMAGE]
            query = [False] * (2 + len(text)) + [True] * N_IMAGE
        else:
            ids, key, query = [BOS, *image], [False, *[True] * N_IMAGE], [False] * (1 + N_IMAGE)
            for question, answer in sample.turns:
                q, a = word_ids(question), word_ids(answer)
                ids += q + a
                key += [False] * len(q + a)
                query += [False] * len(q) + [True] * len(a)
        return ids, query, key

    def collate(self, samples, task):
        self.check(samples, task)
        rows = [self.row(s, task) for s in samples]
        width = max(len(ids) for ids, _, _ in rows)

        def pad(values, fill):
            blank = [fill] * (width - len(values))
            return blank + values if self.left_padding else values + blank

        ids = torch.tensor([pad(list(r[0]), 0) for r in rows])
        mask = torch.tensor([pad([1] * len(r[0]), 0) for r in rows])
        query = torch.tensor([pad(list(r[1]), False) for r in rows])
        key = torch.tensor([pad(list(r[2]), False) for r in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, query, key, mask, [s.id for s in samples], task)

    def forward(self, batch):
        if self.n_forward == self.stop_after:
            raise KeyboardInterrupt  # what a user's Ctrl-C does in the middle of a run
        self.n_forward += 1
        self.sizes.append(tuple(batch.attention_mask.shape))
        return self.model(**batch.inputs)

    def layers(self):
        return list(self.model.model.layers)


def eager_intensity(sample: Sample, task: str, seed: int = 0) -> torch.Tensor:
    """Eq. 1 of one sample, alone in its batch, from the attention matrices themselves -> [L, H]."""
    ids, query, key = FakeAdapter(torch.nn.Identity()).row(sample, task)
    with torch.no_grad():
        out = tiny_llama(seed, "eager")(input_ids=torch.tensor([ids]), output_attentions=True)
    query, key = torch.tensor(query), torch.tensor(key)
    return torch.stack([a[0][:, query][:, :, key].sum(-1).mean(-1) for a in out.attentions])


def generation(n: int = 10) -> list[Sample]:
    words = "a red circle left of the blue square and one green star".split()
    prompts = [" ".join([*words[: 2 + i % 9], f"w{i}"]) for i in range(n)]
    kinds = ("short", "dense")
    return [
        Sample(f"g.jsonl:{i}", "generation", ((p, ""),), (), kinds[i % 2]) for i, p in enumerate(prompts, 1)
    ]


def understanding(picture: Path, n: int = 8) -> list[Sample]:
    samples = []
    for i in range(1, n + 1):
        turns = tuple((f"what is item {j}", "it is a star " * (1 + i % 3)) for j in range(1 + i % 2))
        samples.append(
            Sample(f"u.jsonl:{i}", "understanding", turns, (picture,), ("caption", "choice")[i % 2])
        )
    return samples
