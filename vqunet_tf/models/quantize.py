"""Maths of vector quantization as pure functions of tensors; the layer around it keeps the state.

Neural Discrete Representation Learning, van den Oord, Vinyals, Kavukcuoglu 2017, https://arxiv.org/abs/1711.00937.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from vqunet_tf import backend

# Scores held at once. Small tiles stay in the processor's cache: on CPUs that is faster than one large matrix product.
MAX_BYTES = 2 * 2**20

# Candidate rows are spread over a batch by multiples of the golden ratio: evenly, never in step
# with the rows of an image, and without random state that replicas would have to share.
_GOLDEN = 0.6180339887498949

_TINY = 1e-12  # below this length a vector has no direction


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
    bias = -0.5 * ops.sum(ops.square(codebook), axis=-1)  # [K]
    transposed = ops.transpose(codebook)  # [D, K]

    def nearest(rows: Any) -> Any:
        # Added last, the bias is fused into the product.
        return backend.argmax(ops.add(ops.matmul(rows, transposed), bias))

    most = max(1, max_bytes // (4 * codebook.shape[0]))
    count, width = vectors.shape
    if count is not None and count <= most:
        return nearest(vectors)
    rows = ops.shape(vectors)[0]
    tiles = -(-rows // most) if count is not None else ops.maximum(1, (rows + most - 1) // most)
    tile = (rows + tiles - 1) // tiles  # as even as can be
    last = rows - tile  # where the last tile starts: it overlaps the one before, which costs no padded copy

    def nearest_from(start: Any) -> Any:
        return nearest(ops.slice(vectors, (start, 0), (tile, width)))

    indices = ops.map(nearest_from, ops.minimum(ops.arange(tiles, dtype="int32") * tile, last))
    indices = ops.reshape(indices, (-1,))
    whole = (tiles - 1) * tile
    return ops.concatenate([indices[:whole], indices[tiles * tile - (rows - whole) :]])


def lookup(codebook: Any, indices: Any) -> Any:
    """The chosen codes, `codebook[indices]`: [K, D], int [N] -> [N, D].

    Its gradient is the dense [K, D] sum per code. The sparse one of a plain gather would be exchanged row by row
    between replicas, and differs in size on each.
    """
    number = codebook.shape[0]

    @ops.custom_gradient
    def take(codes: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            upstream = args[0] if upstream is None else upstream
            return ops.segment_sum(upstream, indices, num_segments=number)

        return ops.take(codes, indices, axis=0), gradient

    return take(codebook)


@ops.custom_gradient
def straight_through(vectors: Any, quantized: Any) -> Any:
    """Returns `quantized` exactly, with the gradient of the identity to `vectors` and none to `quantized`.

    Estimating or Propagating Gradients Through Stochastic Neurons, Bengio et al. 2013, https://arxiv.org/abs/1308.3432.
    """
    del vectors  # only their gradient is meant

    def gradient(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
        upstream = args[0] if upstream is None else upstream
        return upstream, ops.zeros_like(upstream)

    return quantized, gradient


@ops.custom_gradient
def rotation(vectors: Any, quantized: Any) -> Any:
    """Returns `quantized` exactly; its gradient is turned and scaled as the vector is onto its code.

    Restructuring Vector Quantization with the Rotation Trick, Fifty et al. 2024, https://arxiv.org/abs/2410.06424:
    with unit vectors a of z and b of q and r of a + b, the constant matrix

        M = |q| / |z| (I - 2 r r^T + 2 b a^T)        maps z to q, so that        grad_z = M^T grad_q.

    Where z or q is zero, or q opposite to z, no rotation is defined, and the identity stands in.
    """
    a, length = _unit(vectors)
    b, code_length = _unit(quantized)
    r, between = _unit(a + b)
    defined = ops.logical_and(ops.logical_and(length > _TINY, code_length > _TINY), between > _TINY)
    scale = code_length / ops.maximum(length, _TINY)

    def gradient(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
        g = args[0] if upstream is None else upstream
        turned = g - 2.0 * r * ops.sum(r * g, -1, keepdims=True) + 2.0 * a * ops.sum(b * g, -1, keepdims=True)
        return ops.where(defined, scale * turned, g), ops.zeros_like(g)

    return quantized, gradient


def soft_codes(vectors: Any, quantized: Any, codebook: Any, temperature: float) -> Any:
    """Returns `quantized` exactly; its gradient is that of the soft assignment, a smooth surrogate of the choice.

        s(z) = sum_k p_k e_k,    p = softmax_k(-|z - e_k|^2 / temperature)
        J^T g = 2 / temperature (sum_k p_k (e_k . g) e_k - (s . g) s)

    Agustsson et al. 2017, Soft-to-Hard Vector Quantization, https://arxiv.org/abs/1704.00648. Holds [N, K] numbers.
    """

    @ops.custom_gradient
    def replace(z: Any, q: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
            g = args[0] if upstream is None else upstream
            scores = ops.matmul(z, ops.transpose(codebook)) - 0.5 * ops.sum(ops.square(codebook), -1)
            share = ops.softmax(2.0 / temperature * scores)  # [N, K]
            mean = ops.matmul(share, codebook)  # [N, D]
            along = ops.matmul(share * ops.matmul(g, ops.transpose(codebook)), codebook)
            back = along - mean * ops.sum(mean * g, -1, keepdims=True)
            return 2.0 / temperature * back, ops.zeros_like(g)

        return q, gradient

    return replace(vectors, quantized)


def on_unit_sphere(vectors: Any) -> Any:
    """Vectors [..., D] divided by their length; zeros stay zeros."""
    return _unit(vectors)[0]


def _unit(vectors: Any) -> tuple[Any, Any]:
    """(unit vectors, lengths [..., 1])."""
    square = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    length = ops.sqrt(ops.maximum(square, _TINY**2))
    return vectors / length, length


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
    turn = ops.mod(ops.cast(step, "float32"), 1024.0)  # small, so that float32 can tell the fractions apart
    sequence = ops.arange(number, dtype="float32") * _GOLDEN + turn * (_GOLDEN**2)
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
