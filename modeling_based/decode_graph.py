# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""One generation step of a BASED model as one CUDA graph: all layers, the head, sampling and the stop check.

A `DecodeStep` owns the generation state in buffers whose addresses never change, so that what was captured once serves every
later prompt of the same shape. A period of `CAPACITY` steps ends with a fold, a second graph, which adds the period's tokens to
the linear attention states and prepares the next period's rotary embedding.

Once every row is finished the step's counters stand still: steps that the host has launched in the meantime rewrite the same
slots, which the next token would overwrite unread, so the state stays the one after the last token that counts.

Only what geobased's kernels serve comes here (`fast_generation.py` decides); without geobased this module is not used.
"""

import contextlib
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from .cache_based import BasedCache, RingSlidingWindowLayer
from .fused_weights import fuse_rows
from .gpu_sampling import SamplingPlan, TokenSampler
from .mixers_based import BasedGatedShortConvolution, BasedTaylorLinearAttention
from .taylor_linear_attention_reference import packed_feature_count

try:
    from geobased.kernels.accept_tokens import accept_tokens
    from geobased.kernels.add_parts_rms_norm import add_parts_rms_norm, linear_in_parts
    from geobased.kernels.add_rms_norm import add_rms_norm
    from geobased.kernels.few_rows_linear import MAX_TRITON_INPUTS, few_rows_linear
    from geobased.kernels.gated_short_convolution_ring_step import gated_short_convolution_ring_step
    from geobased.kernels.programmatic_launch import overlapping_launches
    from geobased.kernels.silu_mul import silu_mul
    from geobased.kernels.sliding_window_attention_step import sliding_window_attention_step
    from geobased.kernels.taylor_linear_attention_decode import (
        make_deferred_state,
        taylor_linear_attention_deferred_step,
        taylor_linear_attention_fold,
        to_running_state,
    )

    KERNELS_ARE_THERE = True
except ImportError:
    KERNELS_ARE_THERE = False

# tokens that wait beside the linear attention state before they are added to it
CAPACITY = 32
# up to this batch norms and gates ride along with the products (two rows are no faster than cuBLAS with kernels between)
FEW_ROWS = 1
# (batch up to, parts): products that write to the residual are cut along their inputs, or most of the GPU waits for few tiles;
# from SPLIT_OUTPUTS outputs on there are tiles enough
SPLITS = ((32, 4), (256, 2))
SPLIT_OUTPUTS = 2048
SPLIT_MULTIPLE = 64  # inputs of one part are a multiple of a tile's
# two captures at once would mix up their memory
_capture_lock = threading.Lock()


@dataclass(frozen=True)
class Projections:
    """Linear layers that read the same input: one product where their weights lie side by side."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    widths: tuple[int, ...]
    fused: torch.Tensor | None

    @classmethod
    def of(cls, *modules: nn.Linear) -> "Projections":
        layers = tuple((m.weight.detach(), None if m.bias is None else m.bias.detach()) for m in modules)
        fused = None
        if len(modules) > 1 and all(m.bias is None for m in modules):
            fused = fuse_rows([m.weight for m in modules])
            layers = tuple((m.weight.detach(), None) for m in modules)
        return cls(layers, tuple(m.out_features for m in modules), fused)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.fused is not None:
            return F.linear(x, self.fused).split(self.widths, dim=-1)
        return tuple(F.linear(x, weight, bias) for weight, bias in self.layers)

    @property
    def is_one_product(self) -> bool:
        return self.fused is not None or len(self.layers) == 1

    def few_rows(self, x: torch.Tensor, **around) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs side by side, and the residual; `around` is what stands before and after (see `few_rows_linear`)."""
        weight, bias = (self.fused, None) if self.fused is not None else self.layers[0]
        return few_rows_linear(x, weight, bias, **around)


class DecodeStep:
    """The step of one model, batch size and way of sampling. Hold `lock` from `load` to the last token.

    Args:
        model: a BasedForCausalLM that `fast_generation.py` found servable. Its weights are kept, not the model itself.
        plan: the kinds of sampling steps.
        num_ends: how many ids end a sequence.
        padded: whether rows may begin with padding.
        captured: whether the step is a CUDA graph; otherwise the same code runs op by op, on any device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        plan: SamplingPlan,
        *,
        num_ends: int,
        padded: bool,
        captured: bool,
    ):
        self.lock = threading.RLock()
        self.addresses: tuple[int, ...] = ()  # where the weights lay when the step was built
        config, weight = model.config, model.lm_head.weight
        self.config, self.device, self.dtype = config, weight.device, weight.dtype
        self.batch, self.padded = batch, padded
        self.eps, self.scaling = config.rms_norm_eps, config.head_dim**-0.5
        with torch.inference_mode(False), torch.no_grad():
            self._take_weights(model)
            self.sampler = TokenSampler(plan, batch, config.vocab_size, self.device)
            self._make_buffers(num_ends)
            self._make_states()
            self.step_graph: torch.cuda.CUDAGraph | None = None
            self.fold_graph: torch.cuda.CUDAGraph | None = None
            if captured:
                self._capture()

    # what the step reads and writes

    def _take_weights(self, model: PreTrainedModel) -> None:
        base = model.model
        self.embedding, self.head, self.final_norm = (
            base.embed_tokens.weight.detach(),
            model.lm_head.weight.detach(),
            base.norm.weight.detach(),
        )
        self.rotary_emb, self.activation = base.rotary_emb, base.layers[0].mlp.act_fn
        self.is_swiglu = self.config.hidden_act in ("silu", "swish")
        self.norms, self.inputs, self.outputs, self.gate_up, self.down, self.taps = [], [], [], [], [], []
        for layer in base.layers:
            mixer, mlp = layer.mixer, layer.mlp
            self.norms.append((layer.input_layernorm.weight.detach(), layer.post_mixer_layernorm.weight.detach()))
            if isinstance(mixer, BasedGatedShortConvolution):
                self.inputs.append(Projections.of(mixer.in_proj))
                self.outputs.append(Projections.of(mixer.out_proj))
                self.taps.append(mixer.conv1d.weight.detach().squeeze(1))
            else:
                self.inputs.append(Projections.of(mixer.q_proj, mixer.k_proj, mixer.v_proj))
                self.outputs.append(Projections.of(mixer.o_proj))
                self.taps.append(None)
            self.gate_up.append(Projections.of(mlp.gate_proj, mlp.up_proj))
            self.down.append(Projections.of(mlp.down_proj))
        self.few_rows, self.split_parts = self._few_rows_serve(), self._parts_that_pay()
        self.feature_dim = next((x.mixer.feature_dim for x in base.layers if isinstance(x.mixer, BasedTaylorLinearAttention)), 1)

    def _few_rows_serve(self) -> bool:
        products = [*self.inputs, *self.outputs, *self.gate_up, *self.down]
        return (
            self.batch <= FEW_ROWS
            and self.device.type == "cuda"
            and self.dtype in (torch.float16, torch.bfloat16)
            and self.is_swiglu
            and all(p.is_one_product and p.layers[0][0].shape[1] <= MAX_TRITON_INPUTS for p in products)
        )

    def _parts_that_pay(self) -> int:
        half = self.dtype in (torch.float16, torch.bfloat16)  # parts are float32; a product of float32 has more work per tile
        if not half or self.device.type != "cuda" or self.config.hidden_size > SPLIT_OUTPUTS:
            return 1
        return next((parts for limit, parts in SPLITS if self.batch <= limit), 1)

    def _make_buffers(self, num_ends: int) -> None:
        integers = {"dtype": torch.int32, "device": self.device}
        half = self.dtype in (torch.float16, torch.bfloat16)
        residual_dtype = torch.float32 if half and self.config.residual_in_fp32 else self.dtype
        self.zeros = torch.zeros(self.batch, self.config.hidden_size, dtype=residual_dtype, device=self.device)
        self.tokens = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.period_tokens = torch.zeros(CAPACITY, self.batch, dtype=torch.long, device=self.device)
        # position of the token that the next step reads; steps since the last fold; tokens picked so far
        self.counters = torch.zeros(3, **integers)
        self.position, self.count, self.generated = self.counters[0:1], self.counters[1:2], self.counters[2:3]
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)  # `count` for ops that take only int64
        self.running = torch.ones(1, **integers)  # 0 once every row is finished
        self.finished = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        self.ends = torch.zeros(num_ends, dtype=torch.long, device=self.device)
        self.pad = torch.zeros((), dtype=torch.long, device=self.device)
        self.first_valid = torch.zeros(self.batch, **integers) if self.padded else None
        # rotary embedding of a period: rows of padded batches are at different positions
        self.period = torch.arange(CAPACITY, device=self.device).unsqueeze(1)
        self.row_positions = torch.zeros(self.batch if self.padded else 1, dtype=torch.long, device=self.device)
        self.has_rotary = "sliding_attention" in self.config.mixers
        self.rotary = self.zeros.new_zeros(
            CAPACITY, 2, self.row_positions.shape[0], self.config.head_dim if self.has_rotary else 0, dtype=self.dtype
        )

    def _make_states(self) -> None:
        config, batch, heads = self.config, self.batch, self.config.num_attention_heads
        make = {"dtype": self.dtype, "device": self.device}
        rows = packed_feature_count(self.feature_dim)
        self.states: list = []
        for mixer in config.mixers:
            if mixer == "conv":
                self.states.append(torch.zeros(batch, config.conv_kernel, config.conv_dim, **make))
            elif mixer == "linear_attention":
                empty = torch.zeros(batch, heads, rows, config.head_dim + 1, dtype=torch.float32, device=self.device)
                # bfloat16 (with its remainder) is half the bytes to read and no less exact than the model's own rounding
                dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
                self.states.append(make_deferred_state(empty, capacity=CAPACITY, dtype=dtype, input_dtype=self.dtype))
            else:
                shape = (batch, heads, config.sliding_window, config.head_dim)
                self.states.append((torch.zeros(shape, **make), torch.zeros(shape, **make)))

    # one token

    def step(self) -> None:
        """Reads `tokens`, picks the next ones into `tokens` and the period's row, and counts."""
        logits = F.linear(self._hidden(), self.head)
        self._accept(self.sampler.sample(logits, self.generated))

    def _hidden(self) -> torch.Tensor:
        """What the head reads, [batch, hidden_size]."""
        x, residual = F.embedding(self.tokens, self.embedding), self.zeros
        cos, sin = self.rotary.index_select(0, self.slot)[0] if self.has_rotary else (None, None)
        for i in range(len(self.states)):
            before_mixer, before_mlp = self.norms[i]
            if self.few_rows:
                y, residual = self.inputs[i].few_rows(x, residual=residual, norm_weight=before_mixer, eps=self.eps)
                x, _ = self.outputs[i].few_rows(self._mix(i, y.split(self.inputs[i].widths, dim=-1), cos, sin))
                x, residual = self.gate_up[i].few_rows(x, residual=residual, norm_weight=before_mlp, eps=self.eps, swiglu=True)
                x, _ = self.down[i].few_rows(x)
                continue
            if i == 0:
                x, residual = add_rms_norm(x, residual, before_mixer, self.eps)  # the zeros stay zero
            else:
                x = self._add_norm(x, self.down[i - 1], residual, before_mixer)
            x = self._to_residual(self.outputs[i], self._mix(i, self.inputs[i](x), cos, sin))
            x = self._add_norm(x, self.outputs[i], residual, before_mlp)
            gate, up = self.gate_up[i](x)
            x = self._to_residual(self.down[i], silu_mul(gate, up) if self.is_swiglu else self.activation(gate) * up)
        return self._add_norm(x, self.down[-1], residual, self.final_norm)

    def _to_residual(self, projection: Projections, x: torch.Tensor) -> torch.Tensor:
        """What a block adds to the residual: [rows, hidden], or in parts that are yet to be added up, without the bias."""
        weight = projection.layers[0][0]
        if self.split_parts > 1 and weight.shape[1] % (SPLIT_MULTIPLE * self.split_parts) == 0:
            return linear_in_parts(x, weight, self.split_parts)
        return projection(x)[0]

    def _add_norm(
        self, added: torch.Tensor, projection: Projections, residual: torch.Tensor, norm_weight: torch.Tensor
    ) -> torch.Tensor:
        """Adds what a block gave to the residual, in place -> the residual's norm."""
        if added.dim() == 3:
            return add_parts_rms_norm(added, projection.layers[0][1], residual, norm_weight, self.eps)
        return add_rms_norm(added, residual, norm_weight, self.eps, inplace=True)[0]

    def _mix(
        self, i: int, projected: tuple[torch.Tensor, ...], cos: torch.Tensor | None, sin: torch.Tensor | None
    ) -> torch.Tensor:
        """Layer i's mixer between its two projections; its state goes on by one token."""
        mixer, state = self.config.mixers[i], self.states[i]
        if mixer == "conv":
            value, gate = projected[0].chunk(2, dim=-1)
            return gated_short_convolution_ring_step(value, gate, self.taps[i], state, self.position)
        q, k, v = (y.unflatten(-1, (self.config.num_attention_heads, -1)) for y in projected)
        if mixer == "linear_attention":
            y = taylor_linear_attention_deferred_step(q, k, v, state, self.count)
        else:
            first_valid, scale = self.first_valid, self.scaling
            y = sliding_window_attention_step(
                q, k, v, *state, self.position, cos=cos, sin=sin, first_valid=first_valid, softmax_scale=scale
            )
        return y.flatten(1)

    def _accept(self, tokens: torch.Tensor) -> None:
        accept_tokens(
            tokens,
            self.tokens,
            self.period_tokens,
            self.finished,
            self.ends,
            self.pad,
            self.counters,
            self.slot,
            self.running,
        )
        if self.sampler.seen is not None:
            self.sampler.seen.scatter_(1, self.tokens.unsqueeze(1), True)

    def fold(self) -> None:
        """Ends a period: the waiting tokens go into the states, and the next positions get their rotary embedding."""
        for mixer, state in zip(self.config.mixers, self.states, strict=True):
            if mixer == "linear_attention":
                taylor_linear_attention_fold(state, self.count)
        self.row_positions.add_(self.count)
        self.count.zero_()
        self.slot.zero_()
        self._fill_rotary()

    def _fill_rotary(self) -> None:
        if self.has_rotary:
            cos, sin = self.rotary_emb(self.rotary, self.row_positions + self.period)  # [CAPACITY, rows, head_dim]
            self.rotary[:, 0], self.rotary[:, 1] = cos, sin

    # capture

    def _capture(self) -> None:
        with _capture_lock, torch.cuda.device(self.device):
            # warming up draws random numbers, and the caller's must not depend on whether a graph was there already
            random_state = torch.cuda.get_rng_state(self.device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            # cuBLAS's kernels do not let the next one start early: overlapping pays only in a chain of our own
            overlap = overlapping_launches if self.few_rows else contextlib.nullcontext
            with torch.cuda.stream(side):
                self._fill_rotary()
                for _ in range(2):  # Triton compiles and cuBLAS takes its workspace before the capture
                    with overlap(self.device):
                        self.step()
                    self.fold()
            torch.cuda.current_stream().wait_stream(side)
            self.step_graph, self.fold_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # a stream of this device: PyTorch's own one for captures stays on the device of the first capture
            stream, mode = torch.cuda.Stream(), "thread_local"
            with torch.cuda.graph(self.step_graph, stream=stream, capture_error_mode=mode), overlap(self.device):
                self.step()
            with torch.cuda.graph(self.fold_graph, pool=self.step_graph.pool(), stream=stream, capture_error_mode=mode):
                self.fold()
            torch.cuda.set_rng_state(random_state, self.device)

    def replay(self) -> None:
        self.step() if self.step_graph is None else self.step_graph.replay()

    def replay_fold(self) -> None:
        self.fold() if self.fold_graph is None else self.fold_graph.replay()

    def state_bytes(self) -> int:
        tensors = [self.sampler.seen]
        for state in self.states:
            tensors += state if isinstance(state, tuple) else [state]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    # from a prompt's cache and back

    def load(
        self,
        cache: BasedCache,
        plan: SamplingPlan,
        *,
        input_ids: torch.Tensor,
        first_valid: torch.Tensor | None,
        row_positions: torch.Tensor,
        ends: list[int],
        pad: int,
        release: bool,
    ) -> None:
        """Takes over the state of a prompt that the model has read into `cache`; `release` empties the cache meanwhile.

        row_positions [batch or 1]: position of the first token to be picked. first_valid [batch]: number of padding tokens.
        """
        self.counters.copy_(torch.tensor([cache.get_seq_length(), 0, 0], dtype=torch.int32))
        self.slot.zero_()
        self.running.fill_(1)
        self.finished.zero_()
        self.ends.copy_(torch.tensor(ends, dtype=torch.long))
        self.pad.fill_(pad)
        if self.first_valid is not None:
            self.first_valid.copy_(first_valid)
        self.row_positions.copy_(row_positions)
        self._fill_rotary()
        self.sampler.load(plan, input_ids)
        order = self._ring_order(cache.get_seq_length())
        for layer, state in zip(cache.layers, self.states, strict=True):
            if isinstance(layer, RingSlidingWindowLayer):
                state[0].copy_(layer._ring_keys)
                state[1].copy_(layer._ring_values)
                if release:
                    layer._ring_keys = layer._ring_values = None
            elif layer.is_recurrent_states_initialized[0]:
                make_deferred_state(layer.recurrent_states[0], out=state)
                if release:
                    layer.recurrent_states[0] = None
            else:
                state.index_copy_(1, order, layer.conv_states[0].transpose(1, 2))
                if release:
                    layer.conv_states[0] = None

    def pick_first(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [batch, vocab_size] of the prompt's last token -> the first new tokens [batch]."""
        self._accept(self.sampler.sample(logits, self.generated))
        self.counters[:2].sub_(1)  # the prompt's last token was read before: only `generated` has gone on
        self.slot.zero_()
        return self.tokens

    def _ring_order(self, length: int) -> torch.Tensor:
        """The slots of the convolution's last inputs, oldest first, after `length` tokens."""
        kernel = self.config.conv_kernel
        return torch.tensor([(length + tap) % kernel for tap in range(kernel)], device=self.device)

    def store(self, cache: BasedCache) -> None:
        """Writes the state after the last token that was read back into `cache`."""
        length = int(self.position)
        order = self._ring_order(length)
        for layer, state in zip(cache.layers, self.states, strict=True):
            if isinstance(layer, RingSlidingWindowLayer):
                layer._ring_keys = _written(layer._ring_keys, state[0])
                layer._ring_values = _written(layer._ring_values, state[1])
                layer.cumulative_length = length
                continue
            assert isinstance(layer, LinearAttentionLayer)
            if layer.is_recurrent_states_initialized[0]:
                layer.recurrent_states[0] = to_running_state(state, self.count, out=layer.recurrent_states[0])
            else:
                inputs = state.index_select(1, order).mT.contiguous()
                inputs[..., 0] = 0  # no later token reads it, and a step after the last one may have written there
                layer.conv_states[0] = _written(layer.conv_states[0], inputs)
        cache._seen_tokens = length


def _written(target: torch.Tensor | None, source: torch.Tensor) -> torch.Tensor:
    return source.clone() if target is None else target.copy_(source)


__all__ = ["CAPACITY", "KERNELS_ARE_THERE", "DecodeStep"]
