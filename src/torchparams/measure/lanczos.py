"""Spectral norm, nuclear norm and ranks of large matrices, estimated with Lanczos iterations from random vectors.

A few random vectors are multiplied by the Gram matrix `AᵀA` repeatedly: one pass over A multiplies all vectors. The
largest singular value comes from the best vector, and its residual bounds the error. Sums over all singular values, for
the nuclear norm and the effective rank, are estimated by stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017).
Their error is the standard error over the random vectors, plus half the distance between two quadrature rules that
enclose the sum (Golub and Meurant, 2010).

scipy's `svds` finds only extreme singular values, and multiplies one vector per pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.measure.singular import Figures, Rows, edge_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.io.blocks import Block

    Array = np.ndarray[Any, Any]

STARTS = 8
"""Number of random vectors; fewer if memory is limited."""

STEPS = 96
"""Maximum number of passes over the matrix."""

CLOSE = 1e-5
"""Relative error of the largest singular value at which the passes stop."""

_FEWEST = 32  # passes, for the sums
_HELD = 1 << 28  # bytes of all vectors


class Product:
    """Accumulate `Aᵀ(A V)` and the sum of squares of A, from the blocks of A in C order.

    Args:
        shape: Rows and columns of A.
        vectors: V, shape (columns, k), float64.
    """

    def __init__(self, shape: tuple[int, int], vectors: Array) -> None:
        self._vectors = vectors
        self._product = np.zeros_like(vectors)
        self._squares = 0.0
        self._rows = Rows(shape, np.dtype(np.float64))

    def update(self, block: Block) -> None:
        """Add the next block."""
        for tile in self._rows.add(block):
            self._add(tile)

    def finish(self) -> tuple[Array, float]:
        """The product and the sum of squares."""
        self._add(self._rows.rest())
        return self._product, self._squares

    def _add(self, tile: Array) -> None:
        with np.errstate(all="ignore"):
            flat = tile.reshape(-1)
            self._squares += float(flat @ flat)
            self._product += tile.T @ (tile @ self._vectors)


def estimate(
    multiply: Callable[[Array], tuple[Array, float]], shape: tuple[int, int], seed: int = 0
) -> tuple[Figures, dict[str, float]]:
    """Estimate the figures of a matrix and their absolute errors: a bound for the largest singular value, else standard
    errors.

    Args:
        multiply: Callable that returns `Aᵀ(A V)` and the sum of squares of A in one pass over A.
        shape: Rows and columns.
        seed: Seed of the random vectors.

    Raises:
        FloatingPointError: A has elements that are not finite.
    """
    _rows, columns = shape
    starts = max(min(STARTS, _HELD // (8 * columns * STEPS)), 2)
    random = np.random.default_rng(seed)
    vectors = random.choice((-1.0, 1.0), (columns, starts)) / math.sqrt(columns)
    basis = [vectors]
    alphas: list[Array] = []
    betas: list[Array] = []
    squares = 0.0
    while True:
        product, squares = multiply(basis[-1])
        if not math.isfinite(squares):
            raise FloatingPointError
        alphas.append(np.einsum("nk,nk->k", basis[-1], product))
        for _ in range(2):  # twice is enough to stay orthogonal
            for vector in basis:
                product -= vector * np.einsum("nk,nk->k", vector, product)
        beta = np.sqrt(np.einsum("nk,nk->k", product, product))
        steps = len(alphas)
        diagonals, beside = np.array(alphas), np.array(betas).reshape(-1, starts)
        ritz = [_tridiagonal(diagonals[:, k], beside[:, k]) for k in range(starts)]
        top, which = max((float(values[-1]), k) for k, (values, _) in enumerate(ritz))
        error = float(beta[which] * abs(ritz[which][1][-1, -1]))
        is_spent = not (beta > 1e-10 * max(top, 1e-300)).all()  # an invariant subspace: the result is exact
        is_close = steps >= _FEWEST and error <= 2 * CLOSE * top
        if is_spent or is_close or steps >= min(STEPS, columns):
            break
        betas.append(beta)
        basis.append(product / beta)
    sums = [_Sums(diagonals[:, k], beside[:, k], float(beta[k]), columns) for k in range(starts)]
    return _figures(sums, top, error, squares, shape)


def _tridiagonal(diagonal: Array, beside: Array) -> tuple[Array, Array]:
    """Non-negative eigenvalues, and eigenvectors, of a symmetric tridiagonal matrix."""
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, -1), UPLO="L")
    return np.maximum(values, 0), vectors


class _Sums:
    """Estimates of Σσ and Σ σ ln σ from one random vector, by a Gauss rule and a Gauss–Radau rule with a node at 0.

    For Σσ, the first is an upper bound and the second a lower bound of the limit of more steps.
    """

    def __init__(self, diagonal: Array, beside: Array, beta: float, scale: float) -> None:
        self.rules = [self._sums(*_tridiagonal(diagonal, beside), scale)]
        matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        last = np.zeros(len(diagonal))
        last[-1] = beta * beta
        end = float(np.linalg.lstsq(matrix, last, rcond=None)[0][-1])
        ritz = _tridiagonal(np.append(diagonal, end), np.append(beside, beta))
        self.rules.append(self._sums(*ritz, scale))

    @staticmethod
    def _sums(values: Array, vectors: Array, scale: float) -> tuple[float, float]:
        sigma, weights = np.sqrt(values), scale * np.square(vectors[0])
        logs = np.log(sigma, out=np.zeros_like(sigma), where=sigma > 0)
        return float((weights * sigma).sum()), float((weights * sigma * logs).sum())


def _figures(
    sums: list[_Sums], top: float, error: float, squares: float, shape: tuple[int, int]
) -> tuple[Figures, dict[str, float]]:
    norm = math.sqrt(top)
    stable = squares / top if top else 0.0
    count = len(sums)
    rules = np.array([each.rules for each in sums])  # (starts, rules, sums)
    middle = rules.mean(axis=1)

    def rank(pair: Array) -> float:
        # With p = σ / S, the entropy is ln S − (Σ σ ln σ) / S.
        total, logs = map(float, pair)
        return math.exp(math.log(total) - logs / total) if total > 0 else 0.0

    found = Figures(
        spectral_norm=norm,
        nuclear_norm=float(middle[:, 0].mean()),
        stable_rank=stable,
        effective_rank=rank(middle.mean(axis=0)),
        rank=None,
        condition=None,
        is_bound=False,
        tail_exponent=None,
        tail_distance=None,
        edge=edge_of(squares, shape),
        spikes=None,
    )
    by_rule = rules.mean(axis=0)
    without = [rank(np.delete(middle, k, axis=0).mean(axis=0)) for k in range(count)]  # the jackknife
    return found, {
        "spectral_norm": error / (2 * norm) if norm else 0.0,
        "nuclear_norm": abs(float(by_rule[0, 0] - by_rule[1, 0])) / 2 + float(middle[:, 0].std(ddof=1)) / count**0.5,
        "stable_rank": stable * error / top if top else 0.0,
        "effective_rank": abs(rank(by_rule[0]) - rank(by_rule[1])) / 2
        + math.sqrt((count - 1) * float(np.var(without))),
    }
