"""What orthogonal methods have left to learn in: the input directions that no past update reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Rows = NDArray[numpy.floating[Any]]


def free_share(rows: Sequence[Rows]) -> float:
    """``1 − rank / n`` of all A_i (r_i, n) of a layer: the share of its inputs' directions outside their span."""
    import numpy

    both = numpy.concatenate([*rows])
    share: float = 1.0 - int(numpy.linalg.matrix_rank(both)) / int(both.shape[1])
    return share
