"""Token ids of prompts and labels: seams, cuts, ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from cl_runner.config.schema import DataConfig, ModelConfig
from cl_runner.errors import UserError
from cl_runner.models.base import Layout, load_base
from cl_runner.models.batch import Example, collate, collate_prompts
from cl_runner.models.encoding import Encoder
from cl_runner.tasks import benchmark
from cl_runner.tasks.rows import load_rows
from cl_runner.tasks.task import Prompt
from tests.models.tiny_models import byte_tokenizer, t5_tokenizer

SAMPLES = Path(__file__).parents[3] / "shared" / "CL_Benchmark"
T5 = Layout(True, pad_id=1, eos_id=0, end_ids=(0,), decoder_start_id=1, vocab_size=420)
CAUSAL = Layout(False, pad_id=0, eos_id=0, end_ids=(0,), decoder_start_id=None, vocab_size=420)
LONG = Prompt("Option: World, Sports\n", "naïve {café} in Zürich and 日本 " * 8, "\nAnswer:")


def t5(**options: Any) -> Encoder:
    return Encoder(t5_tokenizer(), T5, **options)


def causal(bos: bool = True, **options: Any) -> Encoder:
    return Encoder(byte_tokenizer(bos=bos), CAUSAL, **options)


def test_short_prompts_are_the_tokenizers_own_ids() -> None:
    prompt = Prompt("Option: A\n", "a {fox}", "\nAnswer:")
    encoder = t5()
    example = encoder.encode(prompt, "very negative")
    assert example.source == encoder.tokenizer(str(prompt))["input_ids"] and example.source[-1] == 0
    assert example.target == [*encoder.tokenizer("very negative", add_special_tokens=False)["input_ids"], 0]
    assert not example.truncated and not example.target_cut
    decoder = causal()
    assert decoder.encode(prompt, "A").source == decoder.tokenizer(str(prompt))["input_ids"]
    assert decoder.encode(prompt, "A").source[0] == decoder.tokenizer.bos_token_id


def test_a_decoder_only_prompt_never_ends_with_the_end_token() -> None:
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = t5_tokenizer().backend_tokenizer.post_processor
    assert tokenizer("a fox")["input_ids"][-1] == tokenizer.eos_token_id  # as with add_eos_token
    source = Encoder(tokenizer, CAUSAL).encode(Prompt("", "a fox", ""), "A").source
    assert source == tokenizer("a fox")["input_ids"][:-1]


@pytest.mark.parametrize("encoder", [t5(max_source=40), causal(max_source=40), causal(bos=False, max_source=40)])
def test_a_long_text_is_cut_and_both_ends_stay(encoder: Encoder) -> None:
    example = encoder.encode(LONG, "A")
    assert example.truncated and 37 <= len(example.source) <= 40  # a character of up to 3 bytes goes as a whole
    text = encoder.decode(example.source)
    assert text.startswith(LONG.head) and text.endswith(LONG.tail)
    middle = text[len(LONG.head) : len(text) - len(LONG.tail)]
    assert middle and LONG.text.startswith(middle)
    whole = encoder.tokenizer(str(LONG), add_special_tokens=False)["input_ids"]
    content = example.source[len(encoder.before) : len(example.source) - len(encoder.after)]
    kept = next(i for i, (a, b) in enumerate(zip(content, whole, strict=False)) if a != b)
    assert content == whole[:kept] + whole[len(whole) - len(content) + kept :]  # the ids of the whole, one piece out


@pytest.mark.parametrize("encoder", [t5(max_source=40, truncate="tail"), causal(max_source=40, truncate="tail")])
def test_tail_is_what_transformers_does(encoder: Encoder) -> None:
    example = encoder.encode(LONG, "A")
    expected = encoder.tokenizer(str(LONG), truncation=True, max_length=40)["input_ids"]
    assert example.source == expected and len(expected) == 40 and example.truncated


@pytest.mark.parametrize("encoder", [t5(max_source=40, truncate="head"), causal(max_source=40, truncate="head")])
def test_head_is_what_transformers_does_at_the_other_side(encoder: Encoder) -> None:
    example = encoder.encode(LONG, "A")
    whole = encoder.tokenizer(str(LONG), add_special_tokens=False)["input_ids"]
    room = 40 - len(encoder.before) - len(encoder.after)
    assert example.source == encoder.before + whole[-room:] + encoder.after and example.truncated
    assert len(example.source) == 40 and encoder.decode(example.source).endswith(LONG.tail)


TIDY = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
        (" 've", "'ve"), (" 're", "'re")]  # fmt: skip


def collated(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The reference collator's steps, one by one; the clean-up was what decoding did by default."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) > limit:
        text = tokenizer.decode(ids[:limit], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for apart, together in TIDY:
            text = text.replace(apart, together)
    found: list[int] = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return found


WORDS = st.sampled_from(["fox", " , ", " do n't", " 's", ".", " ?", "é", "日本", "</s>", "<pad>", "\n", "  ", "Zürich"])


@settings(max_examples=100, deadline=None)
@given(head=st.text(max_size=12), text=st.lists(WORDS, max_size=30), limit=st.integers(8, 60))
def test_reference_is_what_its_collator_does(head: str, text: list[str], limit: int) -> None:
    prompt = Prompt(head, "".join(text), "\nAnswer:")
    example = t5(max_source=limit, truncate="reference").encode(prompt, "A")
    tokenizer = t5_tokenizer()
    assert example.source == collated(tokenizer, str(prompt), limit)
    assert example.truncated == (len(tokenizer(str(prompt))["input_ids"]) > limit)


def test_reference_is_not_tail_where_a_space_stands_before_punctuation() -> None:
    prompt = Prompt("", "It was n't a fox , he said . " * 5, "\nAnswer:")
    example = t5(max_source=40, truncate="reference").encode(prompt, "A")
    tail = t5(max_source=40, truncate="tail").encode(prompt, "A")
    text = t5().decode(example.source)
    assert text.startswith("It wasn't a fox, he said. It") and "Answer:" not in text
    assert example.source != tail.source and len(example.source) < 40 and example.source[-1] == 0


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/CL_Benchmark beside the checkout")
def test_reference_on_real_rows() -> None:
    base = load_base(ModelConfig(), torch.device("cpu"))
    cut, differing = 0, 0
    for file in sorted(SAMPLES.glob("*/*/test.json")):
        task = benchmark.get(file.parent.name)
        rows = load_rows(task, DataConfig(source="folder", dir=str(SAMPLES), max_test=60), "test").rows
        prompts, labels = [task.prompt(row.text) for row in rows], [row.label for row in rows]
        ours, tail = (
            Encoder(base.tokenizer, base.layout, 256, 50, how).encode_many(prompts, labels)
            for how in ("reference", "tail")  # type: ignore[arg-type]
        )
        for prompt, found, other in zip(prompts, ours, tail, strict=True):
            assert found.source == collated(base.tokenizer, str(prompt), 256)
            cut += found.truncated
            differing += found.source != other.source
            assert found.truncated or found.source == other.source
    assert 0 < differing < cut


def test_reference_is_of_encoder_decoder_models() -> None:
    with pytest.raises(UserError, match=r"^data\.truncate: reference .* decoder-only one takes tail or text"):
        causal(truncate="reference")


@settings(max_examples=60, deadline=None)
@given(
    head=st.text(max_size=12),
    text=st.text(max_size=60),
    tail=st.text(max_size=12),
    limit=st.integers(8, 60),
    kind=st.sampled_from(["t5", "causal"]),
)
def test_any_text_keeps_its_ends(head: str, text: str, tail: str, limit: int, kind: str) -> None:
    encoder = ENCODERS[kind]
    encoder.max_source = limit
    prompt = Prompt(head, text, tail)
    room = limit - len(encoder.before) - len(encoder.after)
    around = [encoder.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, tail)]
    try:
        example = encoder.encode(prompt, "A")
    except UserError:
        # Only where the ends need about all the room (a seam may join or part tokens), or nothing was there.
        assert not str(prompt) or sum(map(len, around)) > room - 8
        return
    assert len(example.source) <= limit
    cut = encoder.decode(example.source)
    assert cut.startswith(head) and cut.endswith(tail)
    middle = cut[len(head) : len(cut) - len(tail)]
    # One token may hold the text's last characters and the tail's first: those characters stay with the tail.
    assert any(text.startswith(middle[:k]) and text.endswith(middle[k:]) for k in range(len(middle) + 1))
    assert example.truncated == (cut != str(prompt))


ENCODERS = {"t5": t5(), "causal": causal(bos=False)}


def test_a_tokenizer_without_offsets_cuts_the_text_too() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    layout = Layout(True, pad_id=0, eos_id=1, end_ids=(1,), decoder_start_id=0, vocab_size=384)
    encoder = Encoder(tokenizer, layout, max_source=60)
    example = encoder.encode(LONG, "A")
    assert 57 <= len(example.source) <= 60 and example.source[-1] == 1
    text = encoder.decode(example.source)
    assert text.startswith(LONG.head) and text.endswith(LONG.tail) and "�" not in text


def test_no_room_for_the_ends() -> None:
    for encoder in (t5(max_source=12), causal(max_source=12)):
        with pytest.raises(UserError, match=r"longer than data\.max_source 12 .*data\.truncate"):
            encoder.encode(LONG, "A")


def test_labels_too_long() -> None:
    label = "Educational Institution"
    need = len(t5_tokenizer()(label)["input_ids"])
    assert t5(max_target=need).encode(LONG, label).target[-1] == 0
    with pytest.raises(
        UserError, match=rf"'Educational Institution' .* data\.max_target {need - 1}; raise it to {need}"
    ):
        t5(max_target=need - 1).encode(LONG, label)
    cut = t5(max_target=need - 1).encode(LONG, label, cut_target=True)
    assert cut.target_cut and len(cut.target) == need - 1 and cut.target[-1] == 0
    assert cut.target == t5_tokenizer()(label, truncation=True, max_length=need - 1)["input_ids"]  # the reference's


def test_an_empty_label_is_the_end_token_alone() -> None:
    assert t5().encode(LONG, "").target == [0]


def test_an_empty_input() -> None:
    with pytest.raises(UserError, match="an input is empty"):
        causal(bos=False).encode(Prompt("", "", ""), "A")


def test_ids_beyond_the_embedding() -> None:
    small = Layout(False, 0, 0, (0,), None, vocab_size=50)
    with pytest.raises(UserError, match="the model has 50 embeddings"):
        Encoder(byte_tokenizer(), small).encode(LONG, "A")


def test_more_tokens_than_positions() -> None:
    with pytest.raises(UserError, match="562 tokens, but the model has 128 positions"):
        Encoder(byte_tokenizer(), Layout(False, 0, 0, (0,), None, 420, max_positions=128))


def test_many_equals_one_by_one() -> None:
    encoder = causal(max_source=40)
    prompts = [LONG, Prompt("", "a fox", "Answer:"), *[LONG._replace(text=f"{i} {LONG.text}") for i in range(5)]]
    labels = ["A", "B", "A", "True", "B", "", "False"]
    assert encoder.encode_many(prompts, labels) == [encoder.encode(p, y) for p, y in zip(prompts, labels, strict=True)]
    assert encoder.encode_many([], []) == []


def test_braces_and_special_token_names_in_user_text(saved: Callable[[str], Path]) -> None:
    encoder = t5()
    for text in ("{0} {sentence} %s {{}}", "{unclosed", "$A $B"):
        assert text in encoder.decode(encoder.encode(Prompt("x ", text, " y"), "A").source)


def test_collate_by_hand() -> None:
    rows = [Example([11, 12, 13], [21, 0]), Example([14], [22, 23, 24, 0])]
    batch = collate(rows, T5, weights=[2.0, 0.5])
    assert batch.input_ids.tolist() == [[11, 12, 13], [14, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[21, 0, -100, -100], [22, 23, 24, 0]]
    assert batch.decoder_input_ids is not None and batch.decoder_input_ids.tolist() == [[1, 21, 1, 1], [1, 22, 23, 24]]
    assert batch.token_weights.tolist() == [[2, 2, 0, 0], [0.5, 0.5, 0.5, 0.5]]
    assert batch.position_ids is None
    batch = collate(rows, CAUSAL, weights=[2.0, 0.0])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21], [14, 22, 23, 24]]
    assert batch.labels.tolist() == [[-100, -100, 21, 0], [22, 23, 24, 0]]
    assert batch.token_weights.tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]]
    assert batch.label_tokens == 2 and batch.size == 2
    prompts = collate_prompts(rows, CAUSAL)
    assert prompts.input_ids.tolist() == [[11, 12, 13], [0, 0, 14]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prompts.position_ids is not None and prompts.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert prompts.labels.shape == (2, 0) and prompts.labels.dtype == torch.long
    with pytest.raises(ValueError, match="1 weights for 2 examples"):
        collate(rows, T5, weights=[1.0])
