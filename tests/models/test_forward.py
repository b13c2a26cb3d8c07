"""Batched logits, losses and greedy answers against one row at a time, naively."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cl_runner.config.schema import ModelConfig
from cl_runner.models.base import Base, load_base
from cl_runner.models.batch import Example, collate, collate_prompts, filler
from cl_runner.models.encoding import Encoder
from cl_runner.models.forward import evaluating, greedy, logits, token_loss
from cl_runner.tasks.task import Prompt

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAMILIES = ("t5", "llama", "gpt2", "qwen2")
CPU = torch.device("cpu")
ROWS = [
    (Prompt("Option: World, Sports\n", "a fox", "\nAnswer:"), "Sports"),
    (Prompt("", "Zürich {braces}", "\nAnswer:"), "very negative, Räume"),
    (Prompt("Task:TC\n", "The quick brown fox jumps over the lazy dog, naïve café", "\nAnswer:"), "A"),
]


def load(folder: Path, **settings: Any) -> Base:
    return load_base(ModelConfig(name=str(folder), **settings), CPU)


def examples_of(base: Base) -> list[Example]:
    return Encoder(base.tokenizer, base.layout, 70, 30).encode_many([p for p, _ in ROWS], [label for _, label in ROWS])


def adapted(base: Base) -> nn.Module:
    """The base under PEFT LoRA with a B that is not zero."""
    torch.manual_seed(3)
    target = {"t5": ["q", "v"], "gpt2": ["c_attn"]}.get(base.model.config.model_type, ["q_proj", "v_proj"])
    kind = "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM"
    fan = base.model.config.model_type == "gpt2"
    config = LoraConfig(task_type=kind, r=4, lora_alpha=16, target_modules=target, fan_in_fan_out=fan)
    model = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.eval()
    return model


def naive_scores(model: nn.Module, base: Base, example: Example) -> torch.Tensor:
    """(len(target), V) of one row by itself: no padding, no mask, no position ids, all logits."""
    with torch.no_grad():
        if base.encoder_decoder:
            start = base.model.config.decoder_start_token_id
            out = model(
                input_ids=torch.tensor([example.source]),
                decoder_input_ids=torch.tensor([[start, *example.target[:-1]]]),
            )
            return out.logits[0]
        out = model(input_ids=torch.tensor([[*example.source, *example.target]]))
        return out.logits[0, len(example.source) - 1 : -1]


def naive_answer(model: nn.Module, base: Base, source: list[int], limit: int) -> list[int]:
    """Arg-max token by token, the whole row anew each time, without cache."""
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(limit):
            if base.encoder_decoder:
                start = base.model.config.decoder_start_token_id
                out = model(
                    input_ids=torch.tensor([source]),
                    decoder_input_ids=torch.tensor([[start, *answer]]),
                    use_cache=False,
                )
            else:
                out = model(input_ids=torch.tensor([source + answer]), use_cache=False)
            token = int(out.logits[0, -1].argmax())
            if token == base.eos_id:
                break
            answer.append(token)
    return answer


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_logits_equal_single_rows(saved: Callable[[str], Path], family: str, wrapped: bool) -> None:
    base = load(saved(family))
    model = adapted(base) if wrapped else base.model
    examples = examples_of(base)
    batch = collate(examples, base.layout)
    scores = logits(model, batch)
    assert scores.shape == (*batch.labels.shape, base.layout.vocab_size)
    for row, example in enumerate(examples):
        columns = batch.labels[row] != -100
        assert batch.labels[row][columns].tolist() == example.target
        torch.testing.assert_close(scores[row][columns], naive_scores(model, base, example), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_rows_own(saved: Callable[[str], Path], family: str) -> None:
    base = load(saved(family))
    examples = examples_of(base)
    weights = [0.5, 2.0, 0.0]
    batch = collate(examples, base.layout, weights=weights)
    loss = (token_loss(logits(base.model, batch), batch.labels) * batch.token_weights).sum()
    expected = 0.0
    for example, weight in zip(examples, weights, strict=True):
        scores = naive_scores(base.model, base, example).double().log_softmax(-1)
        expected -= weight * sum(float(scores[i, token]) for i, token in enumerate(example.target))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert batch.label_tokens == len(examples[0].target) + len(examples[1].target)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_read_to_their_end_have_the_same_loss_and_show_every_token(
    saved: Callable[[str], Path], family: str, head: bool
) -> None:
    """What the trunk, or the head, puts out of each row is what it does of the row by itself, its last token too."""
    base = load(saved(family))
    examples = examples_of(base)
    batch = collate(examples, base.layout, weights=[0.5, 2.0, 0.0])
    whole = batch.read_to_the_end(head=head)
    if base.encoder_decoder:
        assert whole is batch
        return
    seen: list[torch.Tensor] = []
    network: Any = base.model
    watched = network.get_output_embeddings() if head else network.base_model
    hook = watched.register_forward_hook(
        lambda module, given, out: seen.append(out.detach() if head else out[0].detach())
    )
    losses = [(token_loss(logits(base.model, each), each.labels) * each.token_weights).sum() for each in (batch, whole)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert whole.label_tokens == batch.label_tokens
    for row, example in enumerate(examples):
        real = whole.attention_mask[row].bool()
        assert whole.input_ids[row][real].tolist() == [*example.source, *example.target]
        base.model(input_ids=torch.tensor([[*example.source, *example.target]]))
        torch.testing.assert_close(seen[1][row][real], seen[-1][0], rtol=0, atol=1e-5)
    hook.remove()


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_a_naive_loop(saved: Callable[[str], Path], family: str, wrapped: bool) -> None:
    base = load(saved(family))
    # Push the end token, so that rows of a batch end at different lengths.
    model = adapted(base) if wrapped else base.model
    examples = examples_of(base)
    answers = greedy(model, collate_prompts(examples, base.layout), base.layout, 12)
    assert answers == [naive_answer(model, base, example.source, 12) for example in examples]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_early_and_late(saved: Callable[[str], Path], family: str) -> None:
    """With an end token that the model itself soon says, answers end at different lengths, also where pad is end."""
    base = load(saved(family))
    examples = examples_of(base)
    free = [naive_answer(base.model, base, example.source, 12) for example in examples]
    for end in sorted({answer[2] for answer in free if len(answer) > 2}):
        for pad in (end, 5):
            layout = base.layout.__class__(
                base.encoder_decoder, pad, end, (end,), base.layout.decoder_start_id, base.layout.vocab_size
            )
            answers = greedy(base.model, collate_prompts(examples, layout), layout, 12)
            expected = [a[: a.index(end)] if end in a else a for a in free]
            assert answers == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_poisoned_generation_config_changes_nothing(
    saved: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    clean = load(saved(family))
    folder = shutil.copytree(saved(family), tmp_path / "model")
    poison = {
        "num_beams": 4, "repetition_penalty": 9.0, "min_length": 40, "max_length": 5, "suppress_tokens": [3, 4, 5, 6],
        "forced_bos_token_id": 9, "forced_eos_token_id": 10, "no_repeat_ngram_size": 1, "begin_suppress_tokens": [7],
        "do_sample": True, "temperature": 9.0, "top_k": 3, "length_penalty": 3.0, "early_stopping": True,
        "encoder_repetition_penalty": 5.0, "bad_words_ids": [[11]], "penalty_alpha": 0.6, "num_return_sequences": 2,
        "eos_token_id": clean.eos_id, "pad_token_id": 12, "decoder_start_token_id": 14, "use_cache": False,
        "sequence_bias": [[[13], 50.0]], "guidance_scale": 3.0, "return_dict_in_generate": True, "my_own_entry": 3,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(poison))
    base = load(folder)
    examples = examples_of(base)
    expected = [naive_answer(clean.model, clean, example.source, 12) for example in examples]
    assert greedy(base.model, collate_prompts(examples, base.layout), base.layout, 12) == expected
    assert greedy(adapted(base), collate_prompts(examples, base.layout), base.layout, 12) != expected  # LoRA counts


def test_poison_in_an_old_config_json(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Old checkpoints have generation settings in config.json and no generation_config.json."""
    folder = shutil.copytree(saved("t5"), tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    task = {"summarization": {"num_beams": 4, "min_length": 30, "prefix": "summarize: "}}
    config |= {"num_beams": 4, "repetition_penalty": 9.0, "max_length": 5, "task_specific_params": task}
    (folder / "config.json").write_text(json.dumps(config))
    base = load(folder)
    examples = examples_of(base)
    expected = [naive_answer(base.model, base, example.source, 12) for example in examples]
    assert greedy(base.model, collate_prompts(examples, base.layout), base.layout, 12) == expected


def test_dropout_is_off_in_greedy_and_comes_back(saved: Callable[[str], Path]) -> None:
    base = load(saved("t5"))
    examples = examples_of(base)
    model = base.model
    expected = greedy(model, collate_prompts(examples, base.layout), base.layout, 8)
    model.encoder.train()  # some modules train, some do not
    before = {name: module.training for name, module in model.named_modules()}
    assert greedy(model, collate_prompts(examples, base.layout), base.layout, 8) == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_and_fillers(saved: Callable[[str], Path], family: str) -> None:
    base = load(saved(family))
    examples = examples_of(base)
    batch = collate(examples, base.layout)
    scores = logits(base.model, batch)
    for rows in (slice(1, 3), [2, 0], torch.tensor([1])):
        part = batch.slice(rows)
        torch.testing.assert_close(logits(base.model, part), scores[rows], rtol=0, atol=1e-5)
        assert torch.equal(part.labels, batch.labels[rows])
    filled = collate([*examples, filler(examples[0])], base.layout)
    assert filled.size == 4 and filled.label_tokens == batch.label_tokens
    loss = (token_loss(logits(base.model, filled), filled.labels) * filled.token_weights).sum()
    alone = (token_loss(scores, batch.labels) * batch.token_weights).sum()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert torch.isfinite(loss)


def test_gradients_reach_only_label_positions(saved: Callable[[str], Path]) -> None:
    """A filler row and the padding give the adapter no gradient."""
    base = load(saved("gpt2"))
    model = adapted(base)
    example = examples_of(base)[0]

    def gradient(batch: Any) -> torch.Tensor:
        model.zero_grad()
        (token_loss(logits(model, batch), batch.labels) * batch.token_weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])

    alone = gradient(collate([example], base.layout))
    padded = gradient(collate([example, filler(examples_of(base)[2])], base.layout))
    wide = gradient(collate([example, examples_of(base)[2]], base.layout, weights=[1.0, 0.0]))
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, wide, rtol=1e-4, atol=1e-5)


def test_the_head_runs_on_label_positions_alone(saved: Callable[[str], Path]) -> None:
    base = load(saved("llama"))
    batch = collate(examples_of(base), base.layout)
    seen: list[int] = []
    base.model.lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    logits(base.model, batch)
    assert seen == [batch.labels.shape[1]] and batch.labels.shape[1] < batch.input_ids.shape[1]
