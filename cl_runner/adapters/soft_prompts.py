"""Soft prompts in the place of adapters: a few trained vectors before the input of a frozen base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.adapters.base import Adapters, Held
from cl_runner.adapters.pairs import Pair
from cl_runner.adapters.saved import Saved
from cl_runner.errors import UserError


class Prompted(nn.Module):
    """A frozen model, and beside it what trains: so both are parameters of one module, as an engine wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.prompts = nn.ParameterList()

    def get_base_model(self) -> nn.Module:
        """The model itself, by the name that PEFT's wrappers give this."""
        found: nn.Module = self.model
        return found

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """The model's own."""
        return self.model.generate(**inputs)


class Prompts(Adapters):
    """Stands where the adapters do, without a layer of them: ``adapter.*`` says nothing here.

    What the parameters are and how a prompt is made of them is the method's (``condition``), which also carries them
    over: nothing is folded or kept. ``single`` (p, d) is the one prompt that answers, where there is one.

    Raises:
        UserError: the model takes ids alone.
    """

    def __init__(self, model: nn.Module, *, name_or_path: str, encoder_decoder: bool, revision: str | None) -> None:
        if "inputs_embeds" not in inspect.signature(type(model).forward).parameters:
            raise UserError(f"model {name_or_path} takes no embeddings as input; soft prompts cannot stand before it")
        self.name_or_path, self.revision = name_or_path, revision
        self.task_type = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
        self.model: Any = Prompted(model)
        self._names: list[str] = []  # of its parameters
        self.layers, self.past, self.kept = {}, {}, {}
        self.folded, self.dense = [], []
        self.live: str | None = None
        self.single: Tensor | None = None
        model.requires_grad_(False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, fp32, by the method's names."""
        return dict(zip(self._names, self.model.prompts, strict=True))

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """New parameters of these values in place of those there are."""
        device = self.vocabulary.device
        fresh = [value.detach().to(device, torch.float32, copy=True) for value in values.values()]
        self._names, self.model.prompts = list(values), nn.ParameterList(map(nn.Parameter, fresh))

    @property
    def vocabulary(self) -> Tensor:
        """The embeddings of all tokens, (V, d), in the base's precision."""
        table: Tensor = self.model.model.get_input_embeddings().weight
        return table

    def of_vocabulary(self, count: int, generator: torch.Generator) -> Tensor:
        """Embeddings of ``count`` tokens drawn from a CPU generator, (count, d) fp32: where prompts begin."""
        chosen = torch.randint(len(self.vocabulary), (count,), generator=generator)
        return self.vocabulary.detach()[chosen.to(self.vocabulary.device)].float()

    def fold_live(self) -> None:
        """What was learned stays in the parameters, which the method carries."""

    def shown(self) -> None:
        """The parameters answer, whatever the stage."""

    def show(self, what: Any) -> None:
        """The untouched base is asked before the first stage alone, when there are no prompts yet."""

    def keep_live(self) -> None:
        """What was learned stays in the parameters, which the method carries."""

    def held(self, copied: bool = False) -> Held:
        return Held()

    def save(self, where: Path, stage: str, held: Held) -> tuple[Saved, dict[str, Tensor]]:
        """Write ``single``, if there is one, as a plain PEFT folder.

        ``PeftModel.from_pretrained`` answers with it as the model did here; of a decoder-only model row by row, since
        PEFT counts positions through the padding.
        """
        if self.single is not None:
            from peft import PromptTuningConfig
            from safetensors.torch import save_file

            where.mkdir(parents=True)
            prompt = self.single.detach().to("cpu", torch.float32, copy=True).contiguous()
            save_file({"prompt_embeddings": prompt}, where / self.file, metadata={"format": "pt"})
            PromptTuningConfig(
                task_type=self.task_type,
                num_virtual_tokens=prompt.shape[0],
                token_dim=prompt.shape[1],
                num_transformer_submodules=1,  # none before the decoder of an encoder-decoder model
                base_model_name_or_path=self.name_or_path,
                revision=self.revision,
                inference_mode=True,
            ).save_pretrained(str(where))
        return Saved("prompts"), {}

    def load(
        self,
        where: Path,
        stage: str,
        saved: Saved,
        tensors: Mapping[str, Tensor],
        live: str | None,
        earlier: Callable[[str], Pair],
        kept: Mapping[str, Any],
    ) -> Held:
        return Held()

    def restore(
        self,
        folded: Sequence[Pair],
        kept: Mapping[str, Any],
        live: str | None,
        *,
        sums: Mapping[str, Tensor | None] | None = None,
        dense: Sequence[str] = (),
    ) -> None:
        """Nothing is held here: the method gives the parameters."""
