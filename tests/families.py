"""The families of base models that cl-runner takes, as random models of one block; docs/models.md has the same rows.

Nothing is downloaded: each is built by its config, with a tokenizer that puts special tokens where the family's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

WORDS = "say if the word is red or blue : sky sea rose fire leaf moon sun and a very dark bright old new answer yes no"
WINDOW = 6  # tokens that a sliding window of these models sees: fewer than a prompt has
NO_CACHE = "this model keeps no keys and values that rows could go on from"
NO_POSITIONS = "this model cannot go on from keys and values at given positions"


@dataclass(frozen=True)
class Special:
    """A family's special tokens, the first ids: its end, its padding, and what it puts before and behind a text."""

    tokens: str
    end: str
    pad: str | None = None
    before: str = ""
    behind: str = ""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token a word, and these."""
        known = {token: number for number, token in enumerate(dict.fromkeys(f"{self.tokens} {WORDS}".split()))}
        made = Tokenizer(models.WordLevel(known, unk_token=self.end))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        around = [token for token in (self.before, self.behind) if token]
        made.post_processor = processors.TemplateProcessing(
            single=f"{self.before} $A {self.behind}".strip(), special_tokens=[(token, known[token]) for token in around]
        )
        named = {"eos_token": self.end, "pad_token": self.pad, "bos_token": self.before or None}
        extra = [token for token in self.tokens.split() if token not in named.values()]
        return PreTrainedTokenizerFast(
            tokenizer_object=made, additional_special_tokens=extra, **{k: v for k, v in named.items() if v}
        )

    def ids(self) -> dict[str, int | None]:
        """Of a config."""
        numbers = {token: number for number, token in enumerate(self.tokens.split())}
        return {
            "eos_token_id": numbers[self.end],
            "bos_token_id": numbers.get(self.before),
            "pad_token_id": numbers[self.pad] if self.pad else None,
        }


T5 = Special("<pad> </s> <unk>", "</s>", "<pad>", behind="</s>")
LLAMA = Special("<unk> <s> </s>", "</s>", before="<s>")
LLAMA3 = Special("<|begin_of_text|> <|end_of_text|> <|eot_id|>", "<|end_of_text|>", before="<|begin_of_text|>")
GEMMA = Special("<pad> <eos> <bos> <unk>", "<eos>", "<pad>", before="<bos>")
QWEN = Special("<|endoftext|> <|im_start|> <|im_end|>", "<|im_end|>", "<|endoftext|>")
GPT = Special("<|endoftext|>", "<|endoftext|>")
PHI3 = Special("<unk> <s> <|endoftext|> <|end|>", "<|endoftext|>", "<|endoftext|>")
OPT = Special("<s> <pad> </s> <unk>", "</s>", "<pad>", before="</s>")
BLOOM = Special("<unk> <s> </s> <pad>", "</s>", "<pad>")

OF_T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 1, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}  # fmt: skip
OF_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**OF_LLAMA, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
Q_V = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """A family: its config, what is adapted unless one says so, and how the prompts' common beginning is read."""

    kind: str  # transformers' model_type
    special: Special
    settings: dict[str, Any]
    targets: tuple[str, ...] = Q_V
    own_head: bool = False  # in the weights, though transformers takes the config's head for the embeddings
    seed: int = 0  # of weights with which it says this and that, where others repeat one word
    embedding: float = 1.0  # how much larger its embeddings are
    ends: tuple[int, ...] = ()  # that its generation config has beside
    whole: str = ""  # why each row's prompt is read whole
    positions: int | None = None  # how many there are, of a learned table

    @property
    def encoder_decoder(self) -> bool:
        return self.special is T5

    def model(self, **more: Any) -> Any:
        """A random model, with some settings of its config changed; frozen, in eval mode."""
        settings = {**self.special.ids(), **self.settings, **more}
        config = AutoConfig.for_model(self.kind, vocab_size=len(self.special.tokenizer()) + 3, **settings)
        auto = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = auto.from_config(config)
            if self.own_head:
                model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
            for parameter in model.parameters():
                # Far from 0, so that layers, masks, biases and positions all show in the result.
                spread = torch.randn_like(parameter)
                parameter.data = 0.3 * spread if parameter.dim() > 1 else parameter.data + 0.2 * spread
            model.get_input_embeddings().weight.data *= self.embedding
        if self.ends:
            model.generation_config = GenerationConfig(eos_token_id=[config.eos_token_id, *self.ends])
        return model.requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        """The model and its tokenizer, as transformers saves them."""
        self.model().save_pretrained(folder)
        self.special.tokenizer().save_pretrained(folder)


FAMILIES = {
    "T5": Family("t5", T5, OF_T5, ("q", "v"), seed=1, embedding=3.0),  # its scores are over √d
    "Flan-T5": Family(
        "t5", T5, {**OF_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("q", "v"), own_head=True
    ),
    "mT5": Family("mt5", T5, {**OF_T5, "feed_forward_proj": "gated-gelu"}, ("q", "v"), own_head=True),
    "UL2": Family(
        "t5", T5, {**OF_T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}, ("q", "v"), own_head=True
    ),
    "LLaMA 2": Family("llama", LLAMA, OF_LLAMA),
    "LLaMA 3": Family("llama", LLAMA3, {**GROUPED, "rope_parameters": LLAMA3_ROPE}, ends=(2,)),
    "SmolLM": Family("llama", GPT, {**GROUPED, "tie_word_embeddings": True}),
    "Mistral": Family("mistral", LLAMA, {**GROUPED, "sliding_window": WINDOW}, whole=NO_CACHE),
    "Qwen 2": Family("qwen2", QWEN, {**GROUPED, "tie_word_embeddings": True}),
    "Qwen 3": Family("qwen3", QWEN, {**GROUPED, "head_dim": 12}),
    "Gemma": Family("gemma", GEMMA, {**OF_LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
    "Gemma 2": Family(
        "gemma2",
        GEMMA,
        {
            **GROUPED, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
        },
        embedding=0.15,  # they are scaled by √d, and the head is tied
        whole=NO_CACHE,
    ),
    "Gemma 3": Family(
        "gemma3_text",
        GEMMA,
        {
            **GROUPED, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        embedding=0.15,
        whole=NO_CACHE,
    ),
    "Phi": Family("phi", GPT, {**OF_LLAMA, "partial_rotary_factor": 0.5}, (*Q_V, "fc1", "fc2")),
    "Phi-3": Family("phi3", PHI3, {**GROUPED, "sliding_window": None}, ("qkv_proj",), ends=(3,)),
    "GPT-2": Family(
        "gpt2",
        GPT,
        {
            "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        ("c_attn",),
        positions=64,
    ),
    "GPT-NeoX": Family("gpt_neox", GPT, {**OF_LLAMA, "rotary_pct": 0.25}, ("query_key_value",)),
    "OPT": Family(
        "opt",
        OPT,
        {
            "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "word_embed_proj_dim": 16, "do_layer_norm_before": False, "max_position_embeddings": 64, "dropout": 0.0,
        },
        positions=64,
    ),
    "BLOOM": Family(
        "bloom",
        BLOOM,
        {"hidden_size": 32, "n_layer": 1, "n_head": 4},
        ("query_key_value",),
        seed=2,
        whole=NO_POSITIONS,
    ),
}  # fmt: skip
