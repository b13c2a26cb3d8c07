"""Leading singular vectors of a gradient's size: a whole SVD beside ``maths.leading``, in turns, and the energy found.

Matrices are random, with singular values that fall like 1/i (``falling``) or hardly (``flat``, Gaussian entries): a
gradient's lie in between. `--device cuda` on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import median, parser, publish, seconds_of, take_turns
from benchmarks.world import synchronise
from cl_runner.maths.leading import leading

SIDES, COUNTS = (576, 1024, 2048), (8, 160)  # gorp's k, coso's sketch
SPECTRA = ("falling", "flat")


def matrix(side: int, spectrum: str, device: torch.device) -> Tensor:
    """A square one."""
    generator = torch.Generator().manual_seed(side)
    G = torch.randn(side, side, generator=generator)
    if spectrum == "falling":
        G = G / torch.arange(1, side + 1) @ torch.randn(side, side, generator=generator)
    return G.to(device)


def compared(side: int, k: int, spectrum: str, device: torch.device, rounds: int) -> Mapping[str, Any]:
    """A row: both ways' median seconds, and what share of the leading energy ``leading`` has."""
    G = matrix(side, spectrum, device)

    def timed(call: Any) -> float:
        return seconds_of(lambda: (call(), synchronise(device)))

    ways = {"whole": partial(torch.linalg.svd, G, full_matrices=False), "leading": partial(leading, G, k)}
    found = take_turns({name: partial(timed, call) for name, call in ways.items()}, rounds + 1)
    whole, quick = (median(found[name][1:]) for name in ways)
    energy = torch.linalg.svdvals(G)[:k].square().sum()
    held = (leading(G, k)[0].mT @ G).square().sum() / energy
    return {
        "side": side, "k": k, "spectrum": spectrum, "whole ms": 1e3 * whole, "leading ms": 1e3 * quick,
        "whole ÷ leading": whole / quick, "energy %": 100 * float(held),
    }  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    made.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="of the matrices (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="turns of each way (default %(default)s)")
    given = made.parse_args()
    device = torch.device(given.device)
    rows = [compared(side, k, how, device, given.rounds) for side in given.sides for k in COUNTS for how in SPECTRA]
    publish("leading", given, {f"leading singular vectors on {given.device}": rows})


if __name__ == "__main__":
    main()
