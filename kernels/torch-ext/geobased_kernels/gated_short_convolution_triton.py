"""Triton kernels of the gated short convolution: one program per (batch, token tile, channel tile), channels fastest.

Neighbouring rows are loaded once per tap and come from the L1 cache. The backward kernel recomputes the convolution of its
tile and of the kernel - 1 tokens after it, so that nothing but the inputs is saved; each program leaves its share of the
weight gradient, and PyTorch sums the shares: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl

LAUNCH_CONFIGS = {
    "forward": dict(BLOCK_T=32, BLOCK_C=128, num_warps=4),
    "backward": dict(BLOCK_T=32, BLOCK_C=64, num_warps=8),
}


def forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> torch.Tensor:
    """x, gate [batch, seq_len, channels]; weight [channels, kernel]; state [batch, channels, m]; token_mask bool
    [batch, seq_len]; bounds int32 [2, seq_len], start and end of each token's sequence -> y like x."""
    x, gate = (_with_dense_rows(t) for t in (x, gate))
    state = _reachable_rows(state, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = LAUNCH_CONFIGS["forward"]
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(x, config)](
            *(x, gate, weight.t().contiguous(), y), **_shared_arguments(x, gate, weight, state, token_mask, bounds), **config
        )
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as of `forward`, dy like y -> dx, dgate, dweight, dstate (empty without a state)."""
    dy, x, gate = (_with_dense_rows(t) for t in (dy, x, gate))
    dx, dgate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = _reachable_rows(state, weight)
    drows = None if rows is None else torch.empty(rows.shape, dtype=rows.dtype, device=x.device)
    config = LAUNCH_CONFIGS["backward"]
    batch, seq_len, channels = x.shape
    tiles = batch * triton.cdiv(seq_len, config["BLOCK_T"])
    dweight = torch.empty(tiles, weight.shape[1], channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(x, config)](
            *(x, gate, weight.t().contiguous(), dy, dx, dgate, dweight, drows),
            **_shared_arguments(x, gate, weight, rows, token_mask, bounds),
            stride_db=dy.stride(0),
            stride_dt=dy.stride(1),
            HALO=triton.next_power_of_2(weight.shape[1] - 1),
            **config,
        )
    dweight = dweight.sum(0).t().to(weight.dtype).contiguous()
    if state is None:
        return dx, dgate, dweight, x.new_empty(0)
    dstate = torch.zeros(state.shape, dtype=state.dtype, device=x.device)
    if drows is not None:
        dstate[..., state.shape[-1] - drows.shape[1] :] = drows.transpose(1, 2)
    return dx, dgate, dweight, dstate


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    # offsets within a tile are int32: rows far apart are brought together
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


def _reachable_rows(state: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """The newest inputs of the state [batch, channels, m], as many as the kernel reaches, as rows [batch, kept, channels]."""
    if state is None or state.shape[-1] == 0:
        return None
    kept = min(state.shape[-1], weight.shape[1] - 1)
    return state[..., state.shape[-1] - kept :].transpose(1, 2).contiguous()


def _grid(x: torch.Tensor, config: dict) -> tuple[int]:
    batch, seq_len, channels = x.shape
    return (batch * triton.cdiv(seq_len, config["BLOCK_T"]) * triton.cdiv(channels, config["BLOCK_C"]),)


def _shared_arguments(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> dict:
    return dict(
        state=state,
        token_mask=None if token_mask is None else token_mask.contiguous().view(torch.int8),
        bounds=bounds,
        seq_len=x.shape[1],
        channels=x.shape[2],
        kept=0 if state is None else state.shape[1],
        stride_xb=x.stride(0),
        stride_xt=x.stride(1),
        stride_gb=gate.stride(0),
        stride_gt=gate.stride(1),
        HAS_STATE=state is not None,
        HAS_MASK=token_mask is not None,
        PACKED=bounds is not None,
        KERNEL=weight.shape[1],
    )


@triton.jit
def _locate(seq_len, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """-> this program's batch (int64), token tile counted over the batch, first token and channels."""
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    token_tiles = tl.cdiv(seq_len, BLOCK_T)
    program = tl.program_id(0)
    tile = program // channel_tiles
    columns = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tile // token_tiles).to(tl.int64), tile, tile % token_tiles * BLOCK_T, columns


@triton.jit
def _load_rows(base, start, offsets, columns, limit, channels, stride):
    """Rows start + offsets of base [limit, channels] in float32, zero outside."""
    rows = start + offsets
    pointers = base + tl.cast(start, tl.int64) * stride + offsets[:, None] * stride + columns[None, :]
    visible = ((rows >= 0) & (rows < limit))[:, None] & (columns < channels)[None, :]
    return tl.load(pointers, visible, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, start, offsets, columns, limit, channels, x):
    rows = start + offsets
    pointers = base + tl.cast(start, tl.int64) * channels + offsets[:, None] * channels + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), (rows < limit)[:, None] & (columns < channels)[None, :])


@triton.jit
def _load_inputs(
    x,
    state,
    token_mask,
    start,
    offsets,
    columns,
    seq_len,
    channels,
    kept,
    stride_xt,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Inputs of the convolution at tokens start + offsets: x, before it the state, zero where there is neither."""
    rows = start + offsets
    inputs = _load_rows(x, start, offsets, columns, seq_len, channels, stride_xt)
    if HAS_MASK:
        inputs = tl.where(tl.load(token_mask + rows, (rows >= 0) & (rows < seq_len), other=0)[:, None] != 0, inputs, 0.0)
    if HAS_STATE:
        pointers = state + (rows + kept)[:, None] * channels + columns[None, :]
        visible = ((rows < 0) & (rows + kept >= 0))[:, None] & (columns < channels)[None, :]
        inputs += tl.load(pointers, visible, other=0.0).to(tl.float32)
    return inputs


@triton.jit
def _convolve(
    x,
    weight,
    state,
    token_mask,
    bounds,
    start,
    offsets,
    columns,
    seq_len,
    channels,
    kept,
    stride_xt,
    SHIFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """The convolution at tokens start + offsets + SHIFT, float32."""
    conv = tl.zeros([offsets.shape[0], columns.shape[0]], tl.float32)
    for tap in tl.static_range(KERNEL):
        inputs = _load_inputs(
            *(x, state, token_mask, start, offsets + (SHIFT + tap - (KERNEL - 1)), columns, seq_len, channels, kept),
            *(stride_xt, HAS_STATE, HAS_MASK),
        )
        if PACKED:
            tokens = start + offsets + SHIFT
            starts = tl.load(bounds + tokens, (tokens >= 0) & (tokens < seq_len), other=0)
            inputs = tl.where((tokens + (tap - (KERNEL - 1)) >= starts)[:, None], inputs, 0.0)
        conv += inputs * tl.load(weight + tap * channels + columns, columns < channels, other=0.0).to(tl.float32)[None, :]
    return conv


@triton.jit
def _forward_kernel(
    x,
    gate,
    weight,
    y,
    state,
    token_mask,
    bounds,
    seq_len,
    channels,
    kept,
    stride_xb,
    stride_xt,
    stride_gb,
    stride_gt,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, _, start, columns = _locate(seq_len, channels, BLOCK_T, BLOCK_C)
    offsets = tl.arange(0, BLOCK_T)
    if HAS_STATE:
        state += batch * channels * kept
    if HAS_MASK:
        token_mask += batch * seq_len
    conv = _convolve(
        *(x + batch * stride_xb, weight, state, token_mask, bounds, start, offsets, columns, seq_len, channels, kept),
        *(stride_xt, 0, HAS_STATE, HAS_MASK, PACKED, KERNEL),
    )
    gates = _load_rows(gate + batch * stride_gb, start, offsets, columns, seq_len, channels, stride_gt)
    _store_rows(y + batch * seq_len * channels, start, offsets, columns, seq_len, channels, conv * tl.sigmoid(conv) * gates)


@triton.jit
def _convolution_gradient(
    x,
    gate,
    weight,
    dy,
    state,
    token_mask,
    bounds,
    start,
    offsets,
    columns,
    seq_len,
    channels,
    kept,
    stride_xt,
    stride_gt,
    stride_dt,
    SHIFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """-> gradients of the convolution and of the gate at tokens start + offsets + SHIFT, zero outside the sequence."""
    conv = _convolve(
        *(x, weight, state, token_mask, bounds, start, offsets, columns, seq_len, channels, kept),
        *(stride_xt, SHIFT, HAS_STATE, HAS_MASK, PACKED, KERNEL),
    )
    dys = _load_rows(dy, start, offsets + SHIFT, columns, seq_len, channels, stride_dt)
    gates = _load_rows(gate, start, offsets + SHIFT, columns, seq_len, channels, stride_gt)
    sigmoid = tl.sigmoid(conv)
    return dys * gates * sigmoid * (1.0 + conv * (1.0 - sigmoid)), dys * conv * sigmoid


@triton.jit
def _input_gradient(
    x,
    gate,
    weight,
    dy,
    state,
    token_mask,
    bounds,
    start,
    offsets,
    columns,
    seq_len,
    channels,
    kept,
    stride_xt,
    stride_gt,
    stride_dt,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """Gradient of the inputs at tokens start + offsets: every later token within the kernel's reach sends its share."""
    dinputs = tl.zeros([offsets.shape[0], columns.shape[0]], tl.float32)
    for shift in tl.static_range(KERNEL):
        dconv, _ = _convolution_gradient(
            *(x, gate, weight, dy, state, token_mask, bounds, start, offsets, columns, seq_len, channels, kept),
            *(stride_xt, stride_gt, stride_dt, shift, HAS_STATE, HAS_MASK, PACKED, KERNEL),
        )
        if PACKED:
            tokens = start + offsets + shift
            starts = tl.load(bounds + tokens, tokens < seq_len, other=0)
            dconv = tl.where((start + offsets >= starts)[:, None], dconv, 0.0)
        tap = tl.load(weight + (KERNEL - 1 - shift) * channels + columns, columns < channels, other=0.0)
        dinputs += dconv * tap.to(tl.float32)[None, :]
    return dinputs


@triton.jit
def _backward_kernel(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    dweight,
    drows,
    state,
    token_mask,
    bounds,
    seq_len,
    channels,
    kept,
    stride_xb,
    stride_xt,
    stride_gb,
    stride_gt,
    stride_db,
    stride_dt,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, tile, start, columns = _locate(seq_len, channels, BLOCK_T, BLOCK_C)
    offsets = tl.arange(0, BLOCK_T)
    x += batch * stride_xb
    gate += batch * stride_gb
    dy += batch * stride_db
    if HAS_STATE:
        state += batch * channels * kept
        drows += batch * channels * kept
    if HAS_MASK:
        token_mask += batch * seq_len

    dinputs = _input_gradient(
        *(x, gate, weight, dy, state, token_mask, bounds, start, offsets, columns, seq_len, channels, kept),
        *(stride_xt, stride_gt, stride_dt, HAS_STATE, HAS_MASK, PACKED, KERNEL),
    )
    if HAS_MASK:
        tokens = start + offsets
        dinputs = tl.where(tl.load(token_mask + tokens, tokens < seq_len, other=0)[:, None] != 0, dinputs, 0.0)
    _store_rows(dx + batch * seq_len * channels, start, offsets, columns, seq_len, channels, dinputs)

    dconv, dgates = _convolution_gradient(
        *(x, gate, weight, dy, state, token_mask, bounds, start, offsets, columns, seq_len, channels, kept),
        *(stride_xt, stride_gt, stride_dt, 0, HAS_STATE, HAS_MASK, PACKED, KERNEL),
    )
    _store_rows(dgate + batch * seq_len * channels, start, offsets, columns, seq_len, channels, dgates)

    for tap in tl.static_range(KERNEL):
        inputs = _load_inputs(
            *(x, state, token_mask, start, offsets + (tap - (KERNEL - 1)), columns, seq_len, channels, kept),
            *(stride_xt, HAS_STATE, HAS_MASK),
        )
        if PACKED:
            tokens = start + offsets
            starts = tl.load(bounds + tokens, tokens < seq_len, other=0)
            inputs = tl.where((tokens + (tap - (KERNEL - 1)) >= starts)[:, None], inputs, 0.0)
        share = (tl.cast(tile, tl.int64) * KERNEL + tap) * channels + columns
        tl.store(dweight + share, tl.sum(dconv * inputs, 0), columns < channels)

    if HAS_STATE and start == 0:
        before = tl.arange(0, HALO) - HALO
        dkept = _input_gradient(
            *(x, gate, weight, dy, state, token_mask, bounds, start, before, columns, seq_len, channels, kept),
            *(stride_xt, stride_gt, stride_dt, HAS_STATE, HAS_MASK, PACKED, KERNEL),
        )
        visible = (before + kept >= 0)[:, None] & (columns < channels)[None, :]
        pointers = drows + (before + kept)[:, None] * channels + columns[None, :]
        tl.store(pointers, dkept.to(drows.dtype.element_ty), visible)
