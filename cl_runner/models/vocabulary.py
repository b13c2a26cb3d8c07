"""What a model's tokenizer can say: a label that does not come back as it was is never answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from cl_runner.metrics.exact_match import Comparison


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of answer ids, special tokens left out."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class Vocabulary:
    """Texts as a tokenizer has them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def lengths(self, texts: list[str], special: bool = True) -> list[int]:
        """Tokens of each text; special: with those that the tokenizer puts around it."""
        return [len(ids) for ids in self._call(texts, add_special_tokens=special)]

    def unknown(self, texts: list[str]) -> int:
        """Tokens of all texts that stand for characters it has none for."""
        unknown = self.tokenizer.unk_token_id
        return 0 if unknown is None else sum(ids.count(unknown) for ids in self._call(texts))

    def wrong_label(self, labels: Sequence[str], comparison: Comparison) -> str:
        """Why a model with this tokenizer cannot be asked for these labels, with ids; empty if it can."""
        owners: dict[tuple[int, ...], str] = {}
        for label, ids in zip(labels, self._call(labels), strict=True):
            other, said = owners.setdefault(tuple(ids), label), decoded(self.tokenizer, ids)
            if self.tokenizer.unk_token_id in ids:
                problem = f"has unknown tokens ({self.tokenizer.unk_token} is {self.tokenizer.unk_token_id})"
            elif other != label:
                problem = f"has the ids of label '{other}'"
            elif not comparison.same(said, label):
                problem = f"comes back as '{said}'"
            else:
                continue
            return (
                f"label '{label}', ids {list(ids)} in the model's tokenizer, {problem}: no answer could be told to be "
                "it; write the label in other words, or take another model"
            )
        return ""

    def unsayable(self, texts: Sequence[str], comparison: Comparison) -> dict[str, str]:
        """The texts that no answer equals, each with what its ids come back as."""
        different = list(dict.fromkeys(texts))
        found = zip(different, self._call(different), strict=True)
        said = {text: decoded(self.tokenizer, ids) for text, ids in found}
        return {text: back for text, back in said.items() if not comparison.same(back, text)}

    def _call(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        if not texts:
            return []
        options: dict[str, Any] = {"truncation": False, "padding": False, "return_attention_mask": False}
        made = self.tokenizer(list(texts), add_special_tokens=add_special_tokens, **options)
        ids: list[list[int]] = made["input_ids"]
        return ids
