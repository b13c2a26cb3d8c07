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

    both = numpy.concatenate([*rows]).astype(numpy.float64)
    singular = numpy.linalg.svd(both, compute_uv=False)
    rank = int((singular > numpy.finfo(numpy.float32).eps * singular.max(initial=0)).sum())  # as the rows were made
    return 1.0 - rank / int(both.shape[1])
