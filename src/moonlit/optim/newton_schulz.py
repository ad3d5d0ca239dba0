"""Newton-Schulz: the orthogonal factor of a matrix, approximately, by matrix products alone.

Axes: B matrices of equal shape, n rows, m columns.
Source: Moonlight, arXiv:2502.16982, Sec. 2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the step ``X <- a X + b (X X^T) X + c (X X^T)^2 X``."""

NORM_FLOOR = 1e-7
"""Keeps an all-zero matrix (an expert that no token ever reached) at zero; our default."""

BATCH_NUMEL = 2**22
"""Elements orthogonalised in one batched call, our default: 16 MB stay near a CPU's caches."""


def orthogonalize(stacks: list[Float[Tensor, "_ _ _"]]) -> list[Float[Tensor, "_ _ _"]]:
    """Newton-Schulz on stacks of matrices of one shape, up to transposition, in batched calls."""
    tall = [s.shape[1] > s.shape[2] for s in stacks]
    wide = torch.cat([s.mT if t else s for s, t in zip(stacks, tall, strict=True)])
    if not len(wide):
        return stacks
    matrices_per_call = max(1, BATCH_NUMEL // wide[0].numel())
    wide = torch.cat([newton_schulz(part) for part in wide.split(matrices_per_call)])
    return [
        part.mT if t else part
        for part, t in zip(wide.split([len(s) for s in stacks]), tall, strict=True)
    ]


def newton_schulz(
    matrices: Float[Tensor, "B n m"], *, num_steps: int = 5
) -> Float[Tensor, "B n m"]:
    r"""Push every singular value of every matrix towards one and keep the singular vectors.

    Starts at $X_0 = M / \lVert M \rVert_F$. The coefficients trade exactness for speed: after five
    steps the singular values lie between about 0.7 and 1.2, not at one.

    Runs in bf16 on CUDA, as published; elsewhere in the dtype it is given, because a CPU gains
    nothing from bf16. Works on the wide side up, so that ``X X^T`` is the smaller Gram matrix.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if matrices.is_cuda else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=NORM_FLOOR)
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(num_steps):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def newton_schulz_reference(
    matrix: Float[Tensor, "n m"], *, num_steps: int = 5
) -> Float[Tensor, "n m"]:
    r"""The same by definition: an odd polynomial of a matrix acts on its singular values alone.

    $p(U \Sigma V^T) = U\, p(\Sigma)\, V^T$ with $p(s) = a s + b s^3 + c s^5$, applied
    ``num_steps`` times to $\Sigma / \lVert \Sigma \rVert_2$.
    """
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm().clamp(min=NORM_FLOOR)
    for _ in range(num_steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh
