"""Diversity of sentence embeddings: one function per number.

`unit_nd` are embeddings of n documents, scaled to length 1. What is a sum over pairs but has a closed form is computed
by it (mean cosine distance, Vendi score); NovelSum ranks all pairs and is quadratic. None where a number is undefined.

Reads and writes nothing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Float64

from fac_jax.diversity.words import entropy_bits

NEIGHBOURS, DENSITY_POWER, PROXIMITY_POWER = 10, 0.5, 1.0
"""Settings of NovelSum that its authors recommend."""
SAME = 1e-6
"""Squared distances below this are those of equal texts, computed in batches of different shapes."""
KMEANS_ROUNDS = 20  # as in the code of arXiv 2502.17184


def cosine_distance(unit_nd: Float[np.ndarray, "n d"]) -> float | None:
    """Mean over pairs of different documents of 1 - cosine: [0, 2], in practice below 1; higher is more diverse.

    Closed form, linear in n: the sum over all ordered pairs of their cosines is |sum of vectors|^2.
    ("DistSum" with cosine distance in arXiv 2502.17184, as a mean.)
    """
    n = len(unit_nd)
    if n < 2:
        return None
    total = unit_nd.sum(axis=0, dtype=np.float64)
    own = np.square(unit_nd, dtype=np.float64).sum()
    return float(1 - (total @ total - own) / (n * (n - 1)))


def covariance_trace(vectors_nd: Float[np.ndarray, "n d"]) -> float | None:
    """Trace of the covariance of the embeddings (denominator n - 1): their total variance, in squared units of theirs.

    At least 0; higher is more diverse. Only sets embedded by one model can be compared. For vectors of length 1 it *is*
    the mean pairwise cosine distance, so it is taken from the vectors before the model's normalisation.
    """
    return float(vectors_nd.var(axis=0, ddof=1, dtype=np.float64).sum()) if len(vectors_nd) > 1 else None


def vendi_score(unit_nd: Float[np.ndarray, "n d"]) -> float | None:
    """Vendi score: exp of the entropy (in nats) of the eigenvalues of K / n, K the cosines (arXiv 2210.02410).

    The effective number of different documents: from 1 to min(n, d); higher is more diverse. X^T X / n (d x d) has the
    eigenvalues of K / n (n x n) that are not 0, and is what is decomposed.
    """
    if not len(unit_nd):
        return None
    vectors = unit_nd.astype(np.float64)
    values = np.linalg.eigvalsh(vectors.T @ vectors / len(vectors))
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def novel_sum(
    unit_nd: Float[np.ndarray, "n d"],
    reference_rd: Float[np.ndarray, "r d"],
    neighbours: int = NEIGHBOURS,
    density_power: float = DENSITY_POWER,
    proximity_power: float = PROXIMITY_POWER,
) -> float | None:
    """NovelSum (arXiv 2502.17184): mean over documents of their novelty; at least 0, higher is more diverse.

    Novelty of x_i = sigma(x_i)^density_power x the mean of the cosine distances to the other documents, weighted by
    rank^-proximity_power, the nearest having rank 1. Density sigma(x_i) = 1 / the mean squared Euclidean distance to
    the nearest `neighbours` documents of the reference that are not x_i itself: where the reference is dense, a
    distance counts for more. This is what the authors' program (UmeanNever/NovelSum) computes in its present form;
    their text writes sigma(x_j) inside the sum in place of sigma(x_i). It falls as n grows, as documents come nearer.
    None with fewer than two documents, or a reference of too few.
    """
    density_n = density(unit_nd, reference_rd, neighbours)
    if len(unit_nd) < 2 or density_n is None:
        return None
    distance_nn = 1 - unit_nd @ unit_nd.T
    np.fill_diagonal(distance_nn, np.inf)
    distance_nn.sort(axis=1)
    weights = np.arange(1, len(unit_nd), dtype=np.float64) ** -proximity_power
    novelty_n = distance_nn[:, :-1] @ (weights / weights.sum()) * density_n**density_power
    return float(novelty_n.mean())


def density(
    unit_nd: Float[np.ndarray, "n d"], reference_rd: Float[np.ndarray, "r d"], neighbours: int
) -> Float64[np.ndarray, " n"] | None:
    """1 / mean squared distance to the nearest documents of the reference but copies; None if they are too few."""
    if len(reference_rd) < neighbours:
        return None
    squared_nr = np.maximum(2 - 2 * (unit_nd @ reference_rd.T), 0)
    squared_nr[squared_nr < SAME] = np.inf
    nearest = np.partition(squared_nr, neighbours - 1, axis=1)[:, :neighbours]
    return 1 / nearest.mean(axis=1, dtype=np.float64) if np.isfinite(nearest).all() else None


def cluster_entropy(unit_nd: Float[np.ndarray, "n d"], centres_cd: Float[np.ndarray, "c d"]) -> float | None:
    """Entropy, in bits, of how documents spread over clusters of meaning, each document in the nearest one's.

    From 0 to log2 of the number of clusters, or of rows if they are fewer; higher is more diverse. The clusters are
    those of a reference set ("partition entropy" of arXiv 2502.17184): k-means of the set itself would spread any set
    about evenly.
    """
    if not len(unit_nd):
        return None
    squared_nc = np.square(centres_cd).sum(axis=1) - 2 * unit_nd @ centres_cd.T
    return entropy_bits(np.bincount(squared_nc.argmin(axis=1), minlength=len(centres_cd)))


def cluster_centres(
    reference_rd: Float32[np.ndarray, "r d"], clusters: int, seed: int
) -> Float32[np.ndarray, "c d"] | None:
    """k-means of a reference set, from k-means++; None where it has fewer different rows than clusters."""
    from sklearn.cluster import KMeans

    if len(np.unique(reference_rd, axis=0)) < clusters:
        return None
    return KMeans(clusters, n_init=1, max_iter=KMEANS_ROUNDS, random_state=seed).fit(reference_rd).cluster_centers_
