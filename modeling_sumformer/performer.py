# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""FAVOR+, Performer's attention with positive orthogonal random features (Choromanski et al. 2021).

With x~ = x / d^(1/4) and rows w_r of a random projection, the features exp(w_r.x~ - |x~|^2 / 2) / sqrt(m) have the inner product
exp(q.k / sqrt(d)) in expectation, so attention is a sum over the keys that any number of queries can read:

    y_t = sum_r phi_r(q_t) sum_j phi_r(k_j) v_j / sum_r phi_r(q_t) sum_j phi_r(k_j)

Here the sums are kept as logarithms and means: log s_r = log sum_j phi_r(k_j) and the mean of the values under weights
phi_r(k_j) / s_r. Reading is a softmax over the features, nothing overflows and no denominator vanishes, whatever the keys are,
so that no epsilon is needed. A stabiliser taken over all keys, as in other implementations, would let later keys change
earlier outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .prefix_sums import precise_dtype

EMPTY = -1e30  # the logarithm of an empty sum: finite, so that differences of two are numbers
CHUNK = 16  # pairs within a chunk are exact and take chunk * features numbers a token, states between chunks width / chunk


def orthogonal_random_features(
    num_features: int, head_dim: int, *, scaling: str = "norm", generator: torch.Generator | None = None
) -> torch.Tensor:
    """A projection [num_features, head_dim], float32 on the CPU: orthogonal within each block of head_dim rows.

    Rows are uniform in direction; their length is that of a Gaussian vector each (`scaling="norm"`, rows are then Gaussian one
    by one) or sqrt(head_dim) (`"constant"`). Raises `ValueError` for sizes below 1 or an unknown scaling.
    """
    if num_features < 1 or head_dim < 1:
        raise ValueError(f"num_features={num_features} and head_dim={head_dim} must be at least 1")
    if scaling not in ("norm", "constant"):
        raise ValueError(f"scaling={scaling!r} is unknown: choose norm or constant")
    # on the CPU also where a default device is set, as while a model is loaded
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    blocks = []
    for start in range(0, num_features, head_dim):
        gaussian = torch.randn(head_dim, head_dim, **options)
        orthogonal, triangular = torch.linalg.qr(gaussian)
        # LAPACK's choice of signs makes the first entry of the first row negative, always
        blocks.append((orthogonal * triangular.diagonal().sign()).T[: num_features - start])
    if scaling == "norm":
        lengths = torch.randn(num_features, head_dim, **options).norm(dim=1, keepdim=True)
    else:
        lengths = torch.full((num_features, 1), head_dim**0.5, dtype=torch.float64, device="cpu")
    return (torch.cat(blocks) * lengths).float()


def _exponents(x: torch.Tensor, projection: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w_r.x~ [..., num_features] and |x~|^2 / 2 [..., 1]: the features are exp of the difference, up to a constant."""
    x = x * x.shape[-1] ** -0.25
    return x @ projection.T, x.square().sum(-1, keepdim=True) / 2


def _pool(log_k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values' mean under each feature of the keys [..., features, width], and log sums [..., features]."""
    return log_k.softmax(-2).transpose(-1, -2) @ v, log_k.logsumexp(-2).clamp(min=EMPTY)


def _read(log_q: torch.Tensor, mean: torch.Tensor, log_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries [..., n, features] read, [..., n, width], and the logarithm of its weight [..., n]."""
    log_weights = log_q + log_sum.unsqueeze(-2)
    return log_weights.softmax(-1) @ mean, log_weights.logsumexp(-1)


def _causal(
    log_q: torch.Tensor, log_k: torch.Tensor, v: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each query reads of the keys up to its own, the logarithm of its weight, and the state after the last."""
    batch, heads, seq_len, features = log_k.shape
    size = min(CHUNK, max(seq_len, 1))
    missing = -seq_len % size
    log_q, log_k, v = (
        F.pad(x, (0, 0, 0, missing), value=fill).unflatten(2, (-1, size)) for x, fill in ((log_q, 0.0), (log_k, EMPTY), (v, 0.0))
    )
    if state is None:
        mean, log_sum = v.new_zeros(batch, heads, features, v.shape[-1]), v.new_full((batch, heads, features), EMPTY)
    else:
        mean, log_sum = state[..., :-1], state[..., -1]
    means, log_sums = [], []
    for chunk_mean, chunk_log_sum in zip(*(part.unbind(2) for part in _pool(log_k, v)), strict=True):
        means.append(mean)
        log_sums.append(log_sum)
        total = torch.logaddexp(log_sum, chunk_log_sum)
        kept, added = ((part - total).exp().unsqueeze(-1) for part in (log_sum, chunk_log_sum))
        mean, log_sum = mean * kept + chunk_mean * added, total
    new_state = torch.cat([mean, log_sum.unsqueeze(-1)], dim=-1)
    if not means:
        return v.flatten(2, 3), v.new_zeros(batch, heads, 0), new_state
    earlier, log_earlier = _read(log_q, torch.stack(means, 2), torch.stack(log_sums, 2))
    log_weights = (log_q.unsqueeze(-2) + log_k.unsqueeze(-3)).logsumexp(-1)
    future = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    log_weights = torch.cat([log_weights.masked_fill(future, EMPTY), log_earlier.unsqueeze(-1)], dim=-1)
    weights = log_weights.softmax(-1)
    y = weights[..., :-1] @ v + weights[..., -1:] * earlier
    return y.flatten(2, 3)[:, :, :seq_len], log_weights.logsumexp(-1).flatten(2)[:, :, :seq_len], new_state


def _with_eps(
    y: torch.Tensor,
    log_total: torch.Tensor,
    log_q: torch.Tensor,
    v: torch.Tensor,
    largest: torch.Tensor,
    real: torch.Tensor,
    causal: bool,
    eps: float,
) -> torch.Tensor:
    """Adds what `eps` adds to every feature of the keys once they are divided by exp of the largest exponent.

    largest [batch, heads, n] is each key's largest exponent, real [batch or 1, 1, n] is 1 where a key counts.
    """
    if causal:
        stabiliser, values, count = largest.cummax(-1).values, v.cumsum(2), real.cumsum(-1)
    else:
        stabiliser, values, count = largest.amax(-1, keepdim=True), v.sum(2, keepdim=True), real.sum(-1, keepdim=True)
    weight = (log_total - stabiliser).exp().unsqueeze(-1)
    extra = eps * log_q.exp().sum(-1, keepdim=True)
    return (weight * y + extra * values) / (weight + extra * count.unsqueeze(-1)).clamp(min=torch.finfo(y.dtype).tiny)


def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor,
    *,
    causal: bool = False,
    attention_mask: torch.Tensor | None = None,
    eps: float = 0.0,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """FAVOR+ attention, linear in the sequence length.

    Args:
        q, k: [batch, heads, seq_len, head_dim].
        v: [batch, heads, seq_len, width].
        projection: [num_features, head_dim], as `orthogonal_random_features` draws it.
        causal: whether a query reads only the keys up to its own. Query t then gives what it would give were the sequence to end
            with it; later keys have no influence on it, be they ever so large.
        attention_mask: [batch, seq_len], 0 where a key is padding: neither its value nor its features count.
        eps: added to all features, after each query's largest w_r.q~ is subtracted from its exponents, and the largest w_r.k~ of
            all keys that count from those of the keys, as published (1e-4 there). It biases the estimate; nothing here needs it.
        initial_state: [batch, heads, num_features, width + 1], the state after earlier tokens (causal, without `eps`): under each
            feature the values' mean, and the logarithm of the sum of the feature.
        output_final_state: whether to return the state after the last token, too.

    Returns:
        Like v, and the state if asked for. The output is 0 where no key counts. Computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, or a state without `causal` or with `eps`.
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [batch, heads, seq_len, head_dim],"
            " v of any width"
        )
    if projection.dim() != 2 or projection.shape[1] != q.shape[-1]:
        raise ValueError(f"projection {tuple(projection.shape)} must be [num_features, head_dim={q.shape[-1]}]")
    if attention_mask is not None and attention_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must be [batch, seq_len] = {(k.shape[0], k.shape[2])}")
    with_state = initial_state is not None or output_final_state
    if with_state and (not causal or eps):
        raise ValueError("a state needs causal=True and eps=0")
    dtype = precise_dtype(v)
    with torch.autocast(v.device.type, enabled=False):
        value, projection = v.to(dtype), projection.to(dtype)
        (query_exponents, query_norms), (key_exponents, key_norms) = (_exponents(x.to(dtype), projection) for x in (q, k))
        log_q, log_k = query_exponents - query_norms, key_exponents - key_norms
        real = value.new_ones(1, 1, k.shape[2])
        if attention_mask is not None:
            real = (attention_mask != 0).to(dtype).unsqueeze(1)
            padding = real.unsqueeze(-1) == 0
            value = value.masked_fill(padding, 0.0)
            log_k, key_exponents = (x.masked_fill(padding, EMPTY) for x in (log_k, key_exponents))
        if eps:
            log_q = ((log_q - query_exponents.detach().amax(-1, keepdim=True)).exp() + eps).log()
        if causal:
            y, log_total, state = _causal(log_q, log_k, value, initial_state)
        else:
            y, log_total = _read(log_q, *_pool(log_k, value))
        if eps and k.shape[2]:
            y = _with_eps(y, log_total, log_q, value, key_exponents.detach().amax(-1), real, causal, eps)
    y = y.to(v.dtype)
    return (y, state) if output_final_state else y


__all__ = ["favor_attention", "orthogonal_random_features"]
