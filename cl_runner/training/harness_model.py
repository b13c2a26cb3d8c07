"""A run's model after a stage, as lm-evaluation-harness asks models. Imported where that package is installed alone.

Every request goes through the stage's own forwards, as answers to a task that the run does not know: what routers,
prompts and parameter sets add to a method is there, in batches of ours, of both families of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cl_runner.errors import UserError
from cl_runner.models.batch import Example, Question
from cl_runner.training.extra_sets import LONGEST, UNKNOWN
from cl_runner.training.stage import StageRun

Tick = Callable[[str, int, int], None]
MOST_NEW = 256  # tokens of an answer where a task says nothing, as in the harness


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A stage in the place of the harness's ``HFLM``; greedy answers alone.

    tick: takes what is asked, how many requests are answered, and how many there are.
    """

    def __init__(self, stage: StageRun, tick: Tick = lambda *_: None) -> None:
        super().__init__()
        self.stage = stage
        self.tokenizer = stage.room.base.tokenizer
        self.layout = stage.room.base.layout
        self.backend = "seq2seq" if self.layout.encoder_decoder else "causal"
        self.known = UNKNOWN if stage.room.method.knows_task else None
        self._tick = tick

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        prefix = self.stage.room.method.prefix_tokens(len(self.stage.order))
        return (self.layout.max_positions or LONGEST) - prefix

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.layout.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.layout.eos_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What results call the tokenizer."""
        return self.stage.room.base.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the tokenizer's special ones unless told otherwise, or the text begins with one."""
        begin = self.tokenizer.bos_token
        special = not (begin and string.startswith(str(begin))) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Requests of one context are one question, which is read once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for number, (_pair, context, continuation) in enumerate(requests):
            places.setdefault(tuple(self._room_for(context, continuation)), []).append(number)
        questions = [
            Question(Example(list(context), []), [requests[number][2] for number in numbers])
            for context, numbers in places.items()
        ]
        found: dict[int, tuple[float, bool]] = {}
        of = [number for numbers in places.values() for number in numbers]
        likely = self.stage.likelihoods(questions, self.known, self._ticking("likelihoods", len(questions)))
        for number, each in zip(of, (each for row in likely for each in row), strict=True):
            found[number] = (each.log, each.greedy)
        return [found[number] for number in range(len(requests))]

    def _room_for(self, context: list[int], continuation: list[int]) -> list[int]:
        """A context that is too long loses its beginning."""
        if self.layout.encoder_decoder:
            return context[-self.max_length :]
        kept = self.max_length + 1 - len(continuation)
        if kept < 1:
            raise UserError(
                f"--lm-eval: a continuation has {len(continuation)} tokens, over the model's {self.max_length}"
            )
        return context[-kept:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows, each token once."""
        if self.layout.encoder_decoder:
            raise UserError("--lm-eval: the likelihood of whole texts (perplexity) is of decoder-only models")
        windows = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(each)) for each in rolled]
        totals = [0.0] * len(requests)
        for (number, *_rest), (log, _greedy) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, up to what a task says ends one."""
        found = [""] * len(requests)
        for numbers, given in _by_settings([request.args[1] for request in requests]):
            kwargs = normalize_gen_kwargs(given, MOST_NEW)
            if kwargs.get("do_sample") or kwargs.get("temperature"):
                raise UserError("--lm-eval: this task draws its answers (do_sample, temperature); ours are greedy")
            most = int(kwargs["max_gen_toks"])
            room = self.max_length - (0 if self.layout.encoder_decoder else most)
            if room < 1:
                raise UserError(f"--lm-eval: answers of {most} tokens leave no room in the model's {self.max_length}")
            contexts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            examples = [Example(ids, []) for ids in contexts]
            ticking = self._ticking("answers", len(examples))
            answers = self.stage.generate(examples, self.known, ticking, most)
            stops = handle_stop_sequences(kwargs.get("until"), eos=None)
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = postprocess_generated_text(answer, stops, None)
        return found

    def _ticking(self, what: str, total: int) -> Callable[[int], None]:
        return lambda done: self._tick(what, done, total)


def _by_settings(given: Sequence[Mapping[str, Any]]) -> Iterable[tuple[list[int], Mapping[str, Any]]]:
    """The numbers of the requests that are answered under the same settings, and these."""
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(given):
        groups.setdefault(repr(sorted(each.items())), []).append(number)
    return [(numbers, dict(given[numbers[0]])) for numbers in groups.values()]
