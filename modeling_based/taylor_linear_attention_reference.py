"""Taylor linear attention in plain PyTorch: the truth that the Triton form must match.

With s = scale * q.k the attention weight is A = 1 + s + s^2 / 2, the second-order Taylor expansion of exp(s), and

    y_t = sum_{j <= t} A_tj v_j / (sum_{j <= t} A_tj + eps)                        (Arora et al. 2024, section 4.1)

A is an inner product of features, A = phi(q).phi(k), so the sums over the past fit in a state of fixed size. The state holds
the *packed* features (each pair i <= j once, 153 rows for feature_dim 16 instead of 273), and its last column is the
normaliser, the running sum of phi(k):

    state [batch, heads, (d + 1)(d + 2) / 2, head_dim + 1],  always float32 (float64 for float64 inputs)
"""

import functools

import torch
import torch.nn.functional as F

from .without_autocast import without_autocast


def packed_feature_count(feature_dim: int) -> int:
    """Rows of a packed state: 1 constant + d linear + d(d + 1)/2 quadratic features."""
    return (feature_dim + 1) * (feature_dim + 2) // 2


@functools.lru_cache(maxsize=64)
def packed_feature_table(feature_dim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Index and weight tables of the packed features: feature p of x is `weight[p] * x1[i[p]] * x1[j[p]]`, x1 = [x, 1].

    The order is: the constant, the d linear features, then the pairs i <= j row by row. Weights leave out the scale, which
    is applied to x (`x * sqrt(scale)`).
    """
    d = feature_dim
    rows = [(d, d, 1.0)] + [(i, d, 1.0) for i in range(d)]
    rows += [(i, j, 0.5**0.5 if i == j else 1.0) for i in range(d) for j in range(i, d)]
    first, second, weight = zip(*rows, strict=True)
    return first, second, weight


def taylor_feature_map(x: torch.Tensor, *, scale: float | None = None, packed: bool = True) -> torch.Tensor:
    """phi with phi(q).phi(k) = 1 + s + s^2/2, s = scale * q.k.

    x [..., d] -> [..., (d + 1)(d + 2)/2] packed, or [..., 1 + d + d^2] in the order of the paper (constant, linear, all
    products row by row) when `packed` is false. `scale` defaults to d^-0.5.
    """
    d = x.shape[-1]
    x = x * (d**-0.5 if scale is None else scale) ** 0.5
    if not packed:
        products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, products], dim=-1)
    first, second, weight = packed_feature_table(d)
    x1 = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return x1[..., list(first)] * x1[..., list(second)] * x.new_tensor(weight)


def unpack_state(state: torch.Tensor, feature_dim: int) -> torch.Tensor:
    """State with packed rows -> state with the paper's 1 + d + d^2 rows (for comparison with other implementations)."""
    first, second, _ = packed_feature_table(feature_dim)
    row = {pair: p for p, pair in enumerate(zip(first, second, strict=True))}
    d = feature_dim
    rows = list(range(d + 1)) + [row[min(i, j), max(i, j)] for i in range(d) for j in range(d)]
    # an off-diagonal packed row carries both (i, j) and (j, i): sqrt(2) times either of them
    weight = [1.0] * (d + 1) + [1.0 if i == j else 0.5**0.5 for i in range(d) for j in range(d)]
    return state[..., rows, :] * state.new_tensor(weight)[:, None]


@without_autocast
def taylor_linear_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-12,
    chunk_size: int = 128,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal Taylor linear attention, chunk by chunk: linear in the sequence length.

    q, k [batch, seq_len, heads, feature_dim]; v [batch, seq_len, heads, head_dim] -> y like v, and the final state if
    `output_final_state`. attention_mask [batch, seq_len] is 0 where a token is padding: its phi(k) is zero *including the
    constant feature*. With `cu_seqlens` [n + 1] the batch is 1 and holds n sequences end to end; states are then [n, ...].
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [
            taylor_linear_attention_reference(
                q[:, start:end],
                k[:, start:end],
                v[:, start:end],
                attention_mask=None if attention_mask is None else attention_mask[:, start:end],
                initial_state=None if initial_state is None else initial_state[n : n + 1],
                output_final_state=True,
                scale=scale,
                eps=eps,
                chunk_size=chunk_size,
            )
            for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
        y, final_state = torch.cat([p[0] for p in pieces], dim=1), torch.cat([p[1] for p in pieces], dim=0)
        return (y, final_state) if output_final_state else y

    batch, seq_len, heads, d = q.shape
    compute_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    scale = d**-0.5 if scale is None else scale
    q, k, value = (x.to(compute_dtype).transpose(1, 2) for x in (q, k, v))
    # a column of ones beside v makes the last column of every product the normaliser
    value = F.pad(value, (0, 1), value=1.0)
    keep = None if attention_mask is None else attention_mask.to(compute_dtype)[:, None, :, None]

    state = initial_state
    if state is None:
        state = value.new_zeros(batch, heads, packed_feature_count(d), value.shape[-1])
    state = state.to(compute_dtype)
    outputs = []
    for start in range(0, seq_len, chunk_size):
        chunk = slice(start, min(start + chunk_size, seq_len))
        q_c, k_c, v_c = q[:, :, chunk], k[:, :, chunk], value[:, :, chunk]
        if keep is not None:
            v_c = v_c * keep[:, :, chunk]  # A_tj v_j and A_tj * 1 both vanish: the same as phi(k_j) = 0
        s = scale * (q_c @ k_c.transpose(-1, -2))
        numerator = (1 + s + 0.5 * s * s).tril() @ v_c
        if start > 0 or initial_state is not None:
            numerator = numerator + taylor_feature_map(q_c, scale=scale) @ state
        if output_final_state or chunk.stop < seq_len:
            state = state + taylor_feature_map(k_c, scale=scale).transpose(-1, -2) @ v_c
        outputs.append(numerator[..., :-1] / (numerator[..., -1:] + eps))
    y = torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype) if outputs else torch.zeros_like(v)
    return (y, state) if output_final_state else y


@without_autocast
def taylor_linear_attention_step_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """One token: q, k [batch, heads, feature_dim]; v [batch, heads, head_dim] -> y like v; `state` is updated in place."""
    value = F.pad(v.to(state.dtype), (0, 1), value=1.0)
    phi_k = taylor_feature_map(k.to(state.dtype), scale=scale)
    state.add_(phi_k.unsqueeze(-1) * value.unsqueeze(-2))
    numerator = (taylor_feature_map(q.to(state.dtype), scale=scale).unsqueeze(-2) @ state).squeeze(-2)
    return (numerator[..., :-1] / (numerator[..., -1:] + eps)).to(v.dtype)
