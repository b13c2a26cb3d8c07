"""Tiny random models of the families, with tokenizers that round-trip any UTF-8."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other, for seconds on a busy machine

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "Task:TC Dataset:agnews What is the topic of the following paragraph? Choose one from the option.",
    "Option: World, Sports, Business, Science or Technology",
    "very negative, negative, neutral, positive, very positive True False Answer:",
    "Räume, Zürich, naïve café {braces} [brackets] 100% of it\n and a new line\ttab",
] * 4


def byte_tokenizer(bos: bool = False, pad: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any UTF-8 round-trips) with ``</s>``, and ``<s>``, ``<pad>`` if asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>"] + ["<s>"] * bos + ["<pad>"] * pad
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    names = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {}) | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level too, but with ``</s>`` behind the text, as T5 has it; pad 1, end 0."""
    tokenizer = byte_tokenizer(pad=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


TURNS = ("<|im_start|>", "<|im_end|>")
# As SmolLM2's: a system prompt of its own where none is given.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | dict[str, str] = CHATML, bos: bool = True) -> PreTrainedTokenizerFast:
    """``byte_tokenizer`` with a chat template, and the tokens that begin and end its turns."""
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TURNS)})
    tokenizer.chat_template = template
    return tokenizer


def _t5() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.T5Config(
        vocab_size=420, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1, eos_token_id=0,
        decoder_start_token_id=1, dropout_rate=0.1, feed_forward_proj="gated-gelu", initializer_factor=0.5,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    # A head of its own, as T5 v1.1 and Flan have; a random tied one only repeats its input.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model, t5_tokenizer()


def _llama() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.LlamaConfig(
        vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=0, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), byte_tokenizer(bos=True)


def _instruct() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    return _llama()[0], chat_tokenizer()


def _instruct() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    return _llama()[0], chat_tokenizer()


def _gpt2() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.GPT2Config(
        vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), byte_tokenizer()


def _qwen2() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.Qwen2Config(
        vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, max_position_embeddings=128, initializer_range=0.3,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config), byte_tokenizer(pad=True)


FAMILIES: dict[str, Callable[[], tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]]] = {
    "t5": _t5,
    "llama": _llama,
    "instruct": _instruct,
    "gpt2": _gpt2,
    "qwen2": _qwen2,
}


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A token a word, in lower case, and ``<unk>`` (3) for every other; ``</s>`` (0) behind the text, as T5 has it."""
    known = {"</s>": 0, "<pad>": 1, "<s>": 2, "<unk>": 3}
    for word in words.split():
        known.setdefault(word, len(known))
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<s>"
    )
