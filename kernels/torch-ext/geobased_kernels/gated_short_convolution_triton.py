"""Triton kernels of the gated short convolution: a program walks along the tokens of a tile, each thread with its own channels.

The last kernel - 1 inputs stay in registers, so every number is loaded once; rows are loaded in groups ahead of their use.
The backward kernel recomputes the convolution of its tile and of the kernel - 1 tokens after it, so that nothing but the
inputs is saved, and keeps the last gradients in registers in the same way. Each program leaves its share of the weight
gradient, and PyTorch sums the shares: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl

# tiles of BLOCK_T tokens (at least the 7 that a kernel of 8 taps reaches back), loaded GROUP at a time, and BLOCK_C channels
LAUNCH_CONFIGS = {
    "forward": dict(BLOCK_T=32, GROUP=8, BLOCK_C=512, num_warps=4),
    "backward": dict(BLOCK_T=64, GROUP=8, BLOCK_C=256, num_warps=4),
}


def launch_config(kernel: str, seq_len: int, channels: int) -> dict[str, int]:
    config = LAUNCH_CONFIGS[kernel]
    tokens, width = (triton.next_power_of_2(n) for n in (seq_len, channels))
    smaller = {name: min(config[name], n) for name, n in (("BLOCK_T", tokens), ("GROUP", tokens), ("BLOCK_C", width))}
    return config | smaller


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
    config = launch_config("forward", *x.shape[1:])
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
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as of `forward`, dy like y -> dx, dgate, dweight, dstate (empty without a state).

    into: where dx and dgate are written, two tensors of the same strides, channels dense.
    """
    dy, x, gate = (_with_dense_rows(t) for t in (dy, x, gate))
    dx, dgate = into or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = _reachable_rows(state, weight)
    drows = None if rows is None else torch.empty(rows.shape, dtype=rows.dtype, device=x.device)
    batch, seq_len, channels = x.shape
    config = launch_config("backward", seq_len, channels)
    tiles = batch * triton.cdiv(seq_len, config["BLOCK_T"])
    dweight = torch.empty(tiles, weight.shape[1], channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(x, config)](
            *(x, gate, weight.t().contiguous(), dy, dx, dgate, dweight, drows),
            **_shared_arguments(x, gate, weight, rows, token_mask, bounds),
            stride_db=dy.stride(0),
            stride_dt=dy.stride(1),
            stride_ob=dx.stride(0),
            stride_ot=dx.stride(1),
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
def _first_history(
    x,
    state,
    token_mask,
    start,
    seq_len,
    stride,
    columns,
    channels,
    kept,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """The KERNEL - 1 inputs before token `start`: x, before it the state, zero where there is neither."""
    history = ()
    inside = columns < channels
    # a row's number as a block: Triton's interpreter turns `block & scalar` of booleans into integers
    zeros = columns * 0
    for i in tl.static_range(KERNEL - 1):
        row = start + (i - (KERNEL - 1))
        rows = row + zeros
        pointers = x + tl.cast(row, tl.int64) * stride + columns
        values = tl.load(pointers, inside & (rows >= 0) & (rows < seq_len), other=0.0).to(tl.float32)
        if HAS_MASK:
            values = tl.where(tl.load(token_mask + row, (row >= 0) & (row < seq_len), other=0) != 0, values, 0.0)
        if HAS_STATE:
            visible = inside & (rows < 0) & (rows + kept >= 0)
            values += tl.load(state + (row + kept) * channels + columns, visible, other=0.0).to(tl.float32)
        history = history + (values,)
    return history


@triton.jit
def _load_weights(weight, columns, channels, KERNEL: tl.constexpr):
    weights = ()
    for tap in tl.static_range(KERNEL):
        weights = weights + (tl.load(weight + tap * channels + columns, columns < channels, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _convolve(history, inputs, weights, token, sequence_start, PACKED: tl.constexpr, KERNEL: tl.constexpr):
    conv = inputs * weights[KERNEL - 1]
    for tap in tl.static_range(KERNEL - 1):
        values = history[tap]
        if PACKED:
            values = tl.where(token + (tap - (KERNEL - 1)) >= sequence_start, values, 0.0)
        conv += values * weights[tap]
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
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, _, start, columns = _locate(seq_len, channels, BLOCK_T, BLOCK_C)
    x += batch * stride_xb
    gate += batch * stride_gb
    y += batch * seq_len * channels
    if HAS_STATE:
        state += batch * channels * kept
    if HAS_MASK:
        token_mask += batch * seq_len
    weights = _load_weights(weight, columns, channels, KERNEL)
    history = _first_history(
        *(x, state, token_mask, start, seq_len, stride_xt, columns, channels, kept, HAS_STATE, HAS_MASK, KERNEL)
    )
    inside = columns < channels
    zeros = columns * 0
    for walked in range(0, BLOCK_T, GROUP):
        first = start + walked
        xs = ()
        gates = ()
        for i in tl.static_range(GROUP):
            token = first + i
            visible = inside & (token + zeros < seq_len)
            values = tl.load(x + tl.cast(token, tl.int64) * stride_xt + columns, visible, other=0.0)
            if HAS_MASK:
                values = tl.where(tl.load(token_mask + token, token < seq_len, other=0) != 0, values, 0.0)
            xs = xs + (values,)
            gates = gates + (tl.load(gate + tl.cast(token, tl.int64) * stride_gt + columns, visible, other=0.0),)
        for i in tl.static_range(GROUP):
            token = first + i
            inputs = xs[i].to(tl.float32)
            sequence_start = 0
            if PACKED:
                sequence_start = tl.load(bounds + token, token < seq_len, other=0)
            conv = _convolve(history, inputs, weights, token, sequence_start, PACKED, KERNEL)
            history = history[1:] + (inputs,)
            values = conv * tl.sigmoid(conv) * gates[i].to(tl.float32)
            pointers = y + tl.cast(token, tl.int64) * channels + columns
            tl.store(pointers, values.to(y.dtype.element_ty), inside & (token + zeros < seq_len))


@triton.jit
def _walk(
    x,
    gate,
    dy,
    dx,
    dgate,
    drows,
    token_mask,
    bounds,
    start,
    first,
    columns,
    seq_len,
    channels,
    kept,
    stride_xt,
    stride_gt,
    stride_dt,
    stride_ot,
    weights,
    history,
    dconvs,
    dweights,
    OWN: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """Tokens first .. first + COUNT - 1: stores the gradients of their gates and of the inputs KERNEL - 1 tokens before them.

    history and dconvs hold the inputs and the gradients of the convolution of the KERNEL - 1 tokens before, dweights the sums
    so far; all three are returned as of the next token. Of the tokens after the tile (OWN is False) only what they send
    back to the tile counts.
    """
    xs = ()
    gates = ()
    dys = ()
    inside = columns < channels
    zeros = columns * 0
    for i in tl.static_range(COUNT):
        token = first + i
        visible = inside & (token + zeros < seq_len)
        values = tl.load(x + tl.cast(token, tl.int64) * stride_xt + columns, visible, other=0.0)
        if HAS_MASK:
            values = tl.where(tl.load(token_mask + token, token < seq_len, other=0) != 0, values, 0.0)
        xs = xs + (values,)
        gates = gates + (tl.load(gate + tl.cast(token, tl.int64) * stride_gt + columns, visible, other=0.0),)
        dys = dys + (tl.load(dy + tl.cast(token, tl.int64) * stride_dt + columns, visible, other=0.0),)
    for i in tl.static_range(COUNT):
        token = first + i
        inputs = xs[i].to(tl.float32)
        sequence_start = 0
        if PACKED:
            sequence_start = tl.load(bounds + token, token < seq_len, other=0)
        conv = _convolve(history, inputs, weights, token, sequence_start, PACKED, KERNEL)
        sigmoid = tl.sigmoid(conv)
        grads = dys[i].to(tl.float32)
        silu = conv * sigmoid
        dconv = grads * gates[i].to(tl.float32) * (sigmoid + silu * (1.0 - sigmoid))
        if OWN:
            pointers = dgate + tl.cast(token, tl.int64) * stride_ot + columns
            tl.store(pointers, (grads * silu).to(dgate.dtype.element_ty), inside & (token + zeros < seq_len))
            sums = ()
            for tap in tl.static_range(KERNEL - 1):
                seen = history[tap]
                if PACKED:
                    seen = tl.where(token + (tap - (KERNEL - 1)) >= sequence_start, seen, 0.0)
                sums = sums + (dweights[tap] + dconv * seen,)
            dweights = sums + (dweights[KERNEL - 1] + dconv * inputs,)
        history = history[1:] + (inputs,)

        row = token - (KERNEL - 1)  # the newest input that no later token reaches
        dconvs = dconvs + (dconv,)  # of the tokens row .. token
        dinputs = tl.zeros_like(dconv)
        for shift in tl.static_range(KERNEL):
            sent = dconvs[shift]
            if PACKED:
                sender = row + shift
                sequence_start = tl.load(bounds + sender, (sender >= 0) & (sender < seq_len), other=0)
                sent = tl.where(row >= sequence_start, sent, 0.0)
            dinputs += sent * weights[KERNEL - 1 - shift]
        dconvs = dconvs[1:]
        rows = row + zeros
        if HAS_STATE:
            pointers = drows + (row + kept) * channels + columns
            tl.store(pointers, dinputs.to(drows.dtype.element_ty), inside & (rows < 0) & (rows + kept >= 0))
        if HAS_MASK:
            dinputs = tl.where(tl.load(token_mask + row, (row >= 0) & (row < seq_len), other=0) != 0, dinputs, 0.0)
        pointers = dx + tl.cast(row, tl.int64) * stride_ot + columns
        tl.store(pointers, dinputs.to(dx.dtype.element_ty), inside & (rows >= start) & (rows < seq_len))
    return history, dconvs, dweights


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
    stride_ob,
    stride_ot,
    HAS_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, tile, start, columns = _locate(seq_len, channels, BLOCK_T, BLOCK_C)
    x += batch * stride_xb
    gate += batch * stride_gb
    dy += batch * stride_db
    dx += batch * stride_ob
    dgate += batch * stride_ob
    if HAS_STATE:
        state += batch * channels * kept
        drows += batch * channels * kept
    if HAS_MASK:
        token_mask += batch * seq_len
    weights = _load_weights(weight, columns, channels, KERNEL)
    history = _first_history(
        *(x, state, token_mask, start, seq_len, stride_xt, columns, channels, kept, HAS_STATE, HAS_MASK, KERNEL)
    )
    dconvs = ()
    for _ in tl.static_range(KERNEL - 1):
        dconvs = dconvs + (tl.zeros([BLOCK_C], tl.float32),)
    dweights = dconvs + (tl.zeros([BLOCK_C], tl.float32),)
    for walked in range(0, BLOCK_T, GROUP):
        history, dconvs, dweights = _walk(
            *(x, gate, dy, dx, dgate, drows, token_mask, bounds, start, start + walked, columns, seq_len, channels, kept),
            *(stride_xt, stride_gt, stride_dt, stride_ot, weights, history, dconvs, dweights),
            *(True, GROUP, HAS_STATE, HAS_MASK, PACKED, KERNEL),
        )
    history, dconvs, dweights = _walk(
        *(x, gate, dy, dx, dgate, drows, token_mask, bounds, start, start + BLOCK_T, columns, seq_len, channels, kept),
        *(stride_xt, stride_gt, stride_dt, stride_ot, weights, history, dconvs, dweights),
        *(False, KERNEL - 1, HAS_STATE, HAS_MASK, PACKED, KERNEL),
    )
    for tap in tl.static_range(KERNEL):
        share = (tl.cast(tile, tl.int64) * KERNEL + tap) * channels + columns
        tl.store(dweight + share, dweights[tap], columns < channels)
