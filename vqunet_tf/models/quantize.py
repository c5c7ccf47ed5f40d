"""Maths of vector quantization as pure functions of tensors; the layer around it keeps the state.

Neural Discrete Representation Learning, van den Oord, Vinyals, Kavukcuoglu 2017, https://arxiv.org/abs/1711.00937.
"""

from __future__ import annotations

from typing import Any

from keras import ops

MAX_BYTES = 64 * 2**20  # of scores held at once; larger problems go through in tiles of rows

# Candidate rows are spread over a batch by multiples of the golden ratio: evenly, never in step
# with the rows of an image, and without random state that replicas would have to share.
_GOLDEN = 0.6180339887498949


def nearest_codes(vectors: Any, codebook: Any, max_bytes: int = MAX_BYTES) -> Any:
    """Index of the code nearest to each vector; the lowest index wins a tie.

        argmin_k |z - e_k|^2  =  argmax_k  z . e_k - |e_k|^2 / 2

    Args:
        vectors: float32 [N, D].
        codebook: float32 [K, D].
        max_bytes: most memory for scores; more rows than fit are done tile by tile.

    Returns:
        int32 [N], in [0, K).
    """
    bias = 0.5 * ops.sum(ops.square(codebook), axis=-1)  # [K]
    transposed = ops.transpose(codebook)  # [D, K]

    def nearest(rows: Any) -> Any:
        return ops.cast(ops.argmax(ops.matmul(rows, transposed) - bias, axis=-1), "int32")

    tile = max(1, max_bytes // (4 * codebook.shape[0]))
    count, width = vectors.shape
    if count is not None and count <= tile:
        return nearest(vectors)
    rows = ops.shape(vectors)[0]
    tile = ops.maximum(1, ops.minimum(tile, rows)) if count is None else tile
    tiles = (rows + tile - 1) // tile
    padded = ops.pad(vectors, [[0, tiles * tile - rows], [0, 0]])
    indices = ops.map(nearest, ops.reshape(padded, (tiles, tile, width)))
    return ops.reshape(indices, (-1,))[:rows]


@ops.custom_gradient
def straight_through(vectors: Any, quantized: Any) -> Any:
    """Returns `quantized` exactly, with the gradient of the identity to `vectors` and none to `quantized`."""

    def gradient(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
        upstream = args[0] if upstream is None else upstream
        return upstream, ops.zeros_like(upstream)

    return ops.add(quantized, ops.zeros_like(vectors)), gradient


def code_sums(vectors: Any, indices: Any, num_embeddings: int) -> tuple[Any, Any]:
    """Per code: how many vectors chose it [K] and their sum [K, D]."""
    ones = ops.ones_like(vectors[:, 0])
    counts = ops.segment_sum(ones, indices, num_segments=num_embeddings)
    return counts, ops.segment_sum(vectors, indices, num_segments=num_embeddings)


def ema_update(codebook: Any, weights: Any, counts: Any, sums: Any, decay: float) -> tuple[Any, Any]:
    """One step of the exponential moving average of each code's vectors (van den Oord et al. 2017, appendix A.1).

        w' = decay w + (1 - decay) n
        e' = (decay w e + (1 - decay) s) / w'  =  e + (1 - decay) (s - n e) / w'

    The second form needs no stored sums, so nothing can drift: a code that no vector chose (n = 0, s = 0) stays
    exactly where it is, however long.

    Args:
        codebook: e, [K, D]. weights: w, [K]. counts: n, [K]. sums: s, [K, D].

    Returns:
        (e', w').
    """
    updated = decay * weights + (1.0 - decay) * counts
    shift = (1.0 - decay) * (sums - counts[:, None] * codebook)
    return codebook + ops.divide_no_nan(shift, updated[:, None]), updated


def candidate_rows(vectors: Any, number: int, step: Any, replica: Any = 0, replicas: int = 1) -> Any:
    """Picks `number` rows spread evenly over the batch of all replicas, other ones each `step`.

    Summed over the replicas, the result is the same table as on one device holding the batches one after the
    other: a replica fills the rows that it owns and leaves zeros elsewhere.

    Args:
        vectors: [N, D], this replica's rows; N may be 0.
        step: integer scalar.

    Returns:
        [number, D].
    """
    local = ops.maximum(ops.shape(vectors)[0], 1)
    sequence = ops.arange(number, dtype="float32") * _GOLDEN + ops.cast(step, "float32") * (_GOLDEN**2)
    fraction = sequence - ops.floor(sequence)
    total = local * replicas
    place = ops.minimum(ops.cast(fraction * ops.cast(total, "float32"), "int32"), total - 1)
    mine = ops.equal(place // local, replica)
    padded = ops.pad(vectors, [[0, 1], [0, 0]])  # a last row of zeros, also for an empty batch
    return ops.take(padded, ops.where(mine, place % local, ops.shape(vectors)[0]), axis=0)


def kmeans(points: Any, num_embeddings: int, iterations: int = 10) -> Any:
    """Lloyd's algorithm from the first `num_embeddings` points; an empty cluster keeps its centre.

    Args:
        points: [M, D] with M >= num_embeddings.

    Returns:
        Centres [num_embeddings, D].
    """

    def improve(_: Any, centres: Any) -> Any:
        counts, sums = code_sums(points, nearest_codes(points, centres), num_embeddings)
        return ops.where(counts[:, None] > 0, ops.divide_no_nan(sums, counts[:, None]), centres)

    return ops.fori_loop(0, iterations, improve, points[:num_embeddings])


def perplexity(counts: Any) -> Any:
    """exp of the entropy of the code frequencies: 1 when one code does all, K when all are used alike.

    Args:
        counts: [K], non-negative.
    """
    share = counts / ops.maximum(ops.sum(counts), 1.0)
    return ops.exp(-ops.sum(share * ops.log(share + 1e-10)))
