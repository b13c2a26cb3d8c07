"""What each kind's layer computes, against its equation entry by entry in fp64, from the papers and not from PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_runner.adapters.tuned import Tuned
from tests.adapters.families import base_model, logits, off, with_updates
from tests.adapters.tuners import CASES, FACTORS, SETTINGS, begun, moved, opened, values

Values = dict[str, Tensor]


def whole(adapters: Tuned, target: str) -> Tensor:
    return adapters.past[target].base.double()


def dora(adapters: Tuned, target: str, of: Values) -> Tensor:
    W = whole(adapters, target)
    s = adapters.kind.config.alpha / adapters.kind.config.r
    V = W + s * of["lora_B.weight"] @ of["lora_A.weight"]
    rows = [m * row / math.sqrt(sum(float(x) ** 2 for x in row)) for m, row in zip(of[MAGNITUDE], V, strict=True)]
    return torch.stack(rows) - W


def uniform(shape: tuple[int, ...], bound: float, dice: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=dice)


def widest(adapters: Tuned) -> tuple[int, int]:
    shapes = list(adapters.targets().values())
    return max(m for m, _ in shapes), max(n for _, n in shapes)


def vera(adapters: Tuned, target: str, of: Values) -> Tensor:
    """A and B as large as the largest layer, He-uniform from the seed; a layer takes their first rows and columns."""
    r, (m, n) = adapters.kind.config.r, widest(adapters)
    dice = torch.Generator().manual_seed(adapters.kind.config.projection_seed)
    A, B = (uniform(shape, math.sqrt(6 / shape[1]), dice).double() for shape in ((r, n), (m, r)))
    (m, n), b, d = adapters.targets()[target], of["vera_lambda_b"], of["vera_lambda_d"]
    return torch.diag(b) @ B[:m] @ torch.diag(d) @ A[:, :n]


def vblora(adapters: Tuned, target: str, of: Values) -> Tensor:
    bank, k = of["vblora_vector_bank"], adapters.kind.config.topk

    def piece(logits: Tensor) -> Tensor:
        best = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:k]
        weights = [math.exp(float(logits[i])) for i in best]
        mixed: Tensor = sum(w / sum(weights) * bank[i] for w, i in zip(weights, best, strict=True))  # type: ignore[assignment]
        return mixed

    in_A, in_B = of["vblora_logits_A"], of["vblora_logits_B"]  # (r, n/b, h), (m/b, r, h)
    A = torch.stack([torch.cat([piece(logits) for logits in row]) for row in in_A])
    B = torch.stack([torch.cat([piece(logits) for logits in column]) for column in in_B.transpose(0, 1)], dim=1)
    return B @ A


def tied(adapters: Tuned, target: str, of: Values) -> Tensor:
    """The shared factors stand under the first layer's name that has them."""
    m, n = adapters.targets()[target]
    kept = adapters.values().tensors
    A = next(value for name, value in kept.items() if name.endswith("lora_A.factor") and value.shape[1] == n)
    last = target.rsplit(".", 1)[-1]
    B = next(v for k, v in kept.items() if k.endswith(f"{last}.lora_B.factor") and len(v) == m)
    u, v = of["lora_A.vector"], of["lora_B.vector"]
    s = adapters.kind.config.alpha / adapters.kind.config.r
    return s * torch.diag(v) @ B.double() @ torch.diag(u) @ A.double()


def lora_xs(adapters: Tuned, target: str, of: Values) -> Tensor:
    s = adapters.kind.config.alpha / adapters.kind.config.r
    return s * of["lora_B.basis"] @ of["lora_A.mixer"] @ of["lora_A.basis"]


def loha(adapters: Tuned, target: str, of: Values) -> Tensor:
    s = adapters.kind.config.alpha / adapters.kind.config.r
    return s * (of["hada_w1_a"] @ of["hada_w1_b"]) * (of["hada_w2_a"] @ of["hada_w2_b"])


def lokr(adapters: Tuned, target: str, of: Values) -> Tensor:
    small = of["lokr_w1"] if "lokr_w1" in of else of["lokr_w1_a"] @ of["lokr_w1_b"]
    large = of["lokr_w2"] if "lokr_w2" in of else of["lokr_w2_a"] @ of["lokr_w2_b"]
    (a, c), (b, d) = small.shape, large.shape
    s = adapters.kind.config.alpha / adapters.kind.config.r
    return torch.stack(
        [torch.stack([s * small[i // b, j // d] * large[i % b, j % d] for j in range(c * d)]) for i in range(a * b)]
    )


def ia3(adapters: Tuned, target: str, of: Values) -> Tensor:
    W, scale = whole(adapters, target), of["ia3_l"].flatten()
    inner = target.endswith(("wo", "down_proj"))
    return (W @ torch.diag(scale) if inner else torch.diag(scale) @ W) - W


def skew(entries: Tensor, size: int) -> Tensor:
    """The upper triangle row by row, and its negative below."""
    Q, at = torch.zeros(size, size, dtype=torch.float64), iter(entries)
    for i in range(size):
        for j in range(i + 1, size):
            Q[i, j] = next(at)
            Q[j, i] = -Q[i, j]
    return Q


def oft(adapters: Tuned, target: str, of: Values) -> Tensor:
    """x of a block becomes x R."""
    b, W = adapters.kind.config.block_size, whole(adapters, target)
    blocks, eye = [], torch.eye(b, dtype=torch.float64)
    for entries in of["oft_R.weight"]:
        Q = skew(entries, b)
        series = eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
        blocks.append((eye - Q) @ torch.linalg.inv(eye + Q) if adapters.kind.config.cayley == "exact" else series)
    R = torch.block_diag(*(blocks if len(blocks) > 1 else blocks * (W.shape[1] // b)))
    return W @ R.T - W


def boft(adapters: Tuned, target: str, of: Values) -> Tensor:
    W, eye = whole(adapters, target), torch.eye(adapters.kind.config.block_size, dtype=torch.float64)
    halves = [(block - block.T) / 2 for block in of["boft_R"][0]]
    R = torch.block_diag(*[(eye - Q) @ torch.linalg.inv(eye + Q) for Q in halves])
    assert off(R @ R.T, torch.eye(len(R), dtype=torch.float64)) < 1e-12
    return torch.diag(of["boft_s"].flatten()) @ W @ R.T - W


def hra(adapters: Tuned, target: str, of: Values) -> Tensor:
    W = whole(adapters, target)
    found = W
    for u in of["hra_u"].T:
        found = found @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(u, u) / float(u @ u))
    return found - W


def randlora(adapters: Tuned, target: str, of: Values) -> Tensor:
    """One A and many B_j, uniform from the seed and of deviation 1; of a layer wider than high the transpose.

    The columns of all B_j are dealt out to the bases one by one: they are random anyway.
    """
    config, wide = adapters.kind.config, widest(adapters)
    small, large, r = min(wide), max(wide), config.r
    dice = torch.Generator().manual_seed(config.projection_seed)
    A = uniform((r, 1, small), 1 / math.sqrt(small), dice, torch.bfloat16)
    B = [uniform((large, 1, r), 1 / math.sqrt(r), dice, torch.bfloat16) for _ in range(math.ceil(small / r))]
    stacked = torch.cat(B, dim=1)
    A, stacked = (A / A.std()).double(), (stacked / stacked.std()).double()
    m, n = adapters.targets()[target]
    bases = math.ceil(min(m, n) / r)
    columns = stacked[: max(m, n), :bases].flatten(1)
    total = torch.zeros(max(m, n), min(m, n), dtype=torch.float64)
    for j in range(bases):
        B_j = columns[:, [k * bases + j for k in range(r)]]
        lam, gamma = of["randlora_lambda"][:, j], of["randlora_gamma"][j]
        total += B_j @ torch.diag(lam) @ A[:, 0, : min(m, n)] @ torch.diag(gamma)
    return config.alpha / r * (total if m >= n else total.T)


def fourierft(adapters: Tuned, target: str, of: Values) -> Tensor:
    """Σ over places (p, q) of c cos(2π (pi/m + qj/n)) / mn: the real part of the inverse transform."""
    config, (m, n) = adapters.kind.config, adapters.targets()[target]
    places = torch.randperm(m * n, generator=torch.Generator().manual_seed(config.projection_seed))[
        : config.frequencies
    ]
    i, j = np.arange(m)[:, None], np.arange(n)[None, :]
    total = np.zeros((m, n))
    for place, c in zip(places.tolist(), of["fourierft_spectrum"].tolist(), strict=True):
        p, q = divmod(place, n)
        total += c * np.cos(2 * np.pi * (p * i / m + q * j / n))
    return torch.from_numpy(config.scaling * total / (m * n))


MAGNITUDE = "lora_magnitude_vector.weight"
EQUATIONS: dict[str, Callable[[Tuned, str, Values], Tensor]] = {
    "dora": dora, "vera": vera, "vblora": vblora, "tied-lora": tied, "lora-xs": lora_xs, "loha": loha, "lokr": lokr,
    "ia3": ia3, "oft": oft, "boft": boft, "hra": hra, "randlora": randlora, "fourierft": fourierft,
}  # fmt: skip
OTHERWISE = [
    ("oft", {"cayley": "exact"}),
    ("oft", {"block_share": True}),
    ("lokr", {"decompose_both": True}),
    ("lokr", {"r": 9}),  # both factors whole
    ("lokr", {"factor": 2}),
    ("hra", {"r": 2}),
    ("randlora", {"r": 30}),  # one base, wider than some layers
    ("vblora", {"topk": 1}),
]


def test_every_kind_has_its_equation_here() -> None:
    assert set(EQUATIONS) == set(SETTINGS)


@pytest.mark.parametrize(
    ("kind", "family", "settings"),
    [*((*case, {}) for case in CASES), *((kind, "t5", settings) for kind, settings in OTHERWISE)],
)
def test_a_layer_computes_its_equation(kind: str, family: str, settings: dict[str, Any]) -> None:
    """ΔW that is folded, and what the forward makes of it in every layer, are the equation's."""
    base = base_model(family, layers=1)
    adapters = moved(begun(opened(kind, base, family, **settings)))
    wanted = {target: EQUATIONS[kind](adapters, target, values(adapters, target)) for target in adapters.layers}
    found = adapters.live_update()
    assert all(found[target].shape == wanted[target].shape for target in wanted)
    assert max(off(found[target], wanted[target]) for target in wanted) < 1e-5
    assert off(logits(adapters.model), logits(with_updates(base, [wanted]))) < 1e-5
    assert off(logits(adapters.model), logits(base)) > 0.02
    factors = [found for group in adapters.groups() for found in zip(group.targets, group.A, group.B, strict=True)]
    assert len(factors) == (len(adapters.layers) if kind in FACTORS else 0)
    for target, A, B in factors:
        product, W = adapters.scale * B @ A, whole(adapters, target)
        if kind == "dora":  # of the direction, whose length is another
            assert torch.cosine_similarity(W + product, W + wanted[target]).min() > 1 - 1e-6
        else:
            assert off(product, wanted[target]) < 1e-5


def test_the_norm_of_dora_is_a_constant_in_the_gradient() -> None:
    """Section 4.3 of the paper: the gradient of A and B is that of a direction whose length is held."""
    base = base_model("t5", layers=1)
    adapters = moved(begun(opened("dora", base)))
    target = next(iter(adapters.layers))
    x, mix = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    own = {name: p for name, p in adapters.parameters().items() if name.startswith(f"{target}.")}
    out = adapters.layers[target](x.float())
    ours = torch.autograd.grad((out * mix).sum(), list(own.values()))

    def naive(held: bool) -> list[Tensor]:
        A, B, m = (p.detach().double().requires_grad_() for p in own.values())
        V = whole(adapters, target) + adapters.scale * B @ A
        length = V.norm(dim=1)
        direction = V / (length.detach() if held else length)[:, None]
        return list(torch.autograd.grad((x @ (m[:, None] * direction).T * mix).sum(), (A, B, m)))

    assert [name.removeprefix(f"{target}.") for name in own] == ["lora_A.weight", "lora_B.weight", MAGNITUDE]
    assert max(map(off, ours, naive(held=True))) < 1e-5
    assert min(map(off, ours[:2], naive(held=False)[:2])) > 0.01


@pytest.mark.parametrize("kind", ["vera", "randlora", "fourierft"])
def test_what_is_random_is_of_its_seed_and_the_same_in_all_layers_and_stages(kind: str) -> None:
    base = base_model("t5", layers=1)

    def update(seed: int, drawn: int = 0) -> dict[str, Tensor]:
        adapters = begun(opened(kind, base, projection_seed=seed), seed=drawn)
        for parameter in adapters.parameters().values():
            parameter.data.copy_(torch.linspace(0.1, 0.4, parameter.numel()).view(parameter.shape))
        return adapters.live_update()

    torch.manual_seed(0)
    first = update(3)
    torch.manual_seed(1)
    assert all(torch.equal(delta, first[target]) for target, delta in update(3, drawn=9).items())
    assert all(off(delta, first[target]) > 0.5 for target, delta in update(4).items())
    square = [delta for delta in first.values() if delta.shape == (24, 24)]
    assert len(square) == 6 and all(torch.equal(delta, square[0]) for delta in square)


def test_layers_of_vera_share_one_pair() -> None:
    adapters = begun(opened("vera", base_model("t5", layers=1)))
    assert len({layer.vera_A["default"].data_ptr() for layer in adapters.layers.values()}) == 1
    assert len({layer.vera_B["default"].data_ptr() for layer in adapters.layers.values()}) == 1
    assert adapters.layers["encoder.block.0.layer.0.SelfAttention.q"].vera_A["default"].shape == (6, 32)


def test_a_piece_of_vblora_trains_the_vectors_it_is_of_and_no_other() -> None:
    adapters = begun(opened("vblora", base_model("t5", layers=1)))
    sum(delta.sum() for delta in map(adapters._update, adapters.layers)).backward()
    chosen = set()
    for name, parameter in adapters.parameters().items():
        if "logits" in name:
            best = parameter.topk(3).indices
            grads = parameter.grad.gather(-1, best)
            assert torch.equal(parameter.grad.clone().scatter_(-1, best, 0.0).abs().sum(), torch.zeros(()))
            assert grads.abs().sum() > 0
            chosen.update(best.flatten().tolist())
    bank = adapters.parameters()["vblora_vector_bank"]
    assert len(chosen) == 7 == int((bank.grad.abs().sum(1) > 0).sum())


def test_lora_xs_stands_between_the_leading_singular_vectors_of_the_weight_as_it_is() -> None:
    """As the official code has it, Σ_r on the input's side; of W with what is folded in it, anew at each stage."""
    adapters = opened("lora-xs", base_model("t5", layers=1))
    bases: list[Tensor] = []
    for stage in range(2):
        begun(adapters, f"s{stage}", stage)
        for target, layer in adapters.layers.items():
            A, B = layer.lora_A["default"].basis.double().numpy(), layer.lora_B["default"].basis.double().numpy()
            U, S, Vh = np.linalg.svd(adapters.past[target].whole.double().numpy())
            assert np.allclose(B.T @ B, np.eye(3), atol=1e-5)
            assert all(column[np.abs(column).argmax()] > 0 for column in B.T)  # signs that are nobody's choice
            assert np.allclose(A @ A.T, np.diag(S[:3] ** 2), rtol=1e-4, atol=1e-4)
            best = U[:, :3] * S[:3] @ Vh[:3]  # whatever the signs of the vectors
            assert np.linalg.norm(B @ A - best) < 1e-4 * np.linalg.norm(best)
        bases.append(layer.lora_B["default"].basis.clone())
        moved(adapters, stage, size=1.0).fold_live()
    assert off(*bases) > 0.1


def test_layers_of_tied_lora_share_factors_and_have_vectors_of_their_own() -> None:
    adapters = begun(opened("tied-lora", base_model("t5", layers=2)))
    layers = adapters.layers.values()
    by_width = {layer.in_features: layer.lora_A["default"].factor for layer in layers}
    assert set(by_width) == {24, 32}
    assert all(layer.lora_A["default"].factor is by_width[layer.in_features] for layer in layers)
    by_name: dict[str, Tensor] = {}
    for target, layer in adapters.layers.items():
        assert by_name.setdefault(target.rsplit(".", 1)[-1], layer.lora_B["default"].factor) is (
            layer.lora_B["default"].factor
        )
    assert len({id(factor) for factor in by_name.values()}) == 4
    assert len({id(layer.lora_A["default"].vector) for layer in layers}) == len(adapters.layers)
    assert len(adapters.parameters()) == 2 + 4 + 2 * len(adapters.layers)
