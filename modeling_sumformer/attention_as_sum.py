# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""One attention layer suffices: Transformers, Linformers and Performers with the weights of a given Sumformer."""

from dataclasses import dataclass

import torch

from .configuration_sumformer import SumformerConfig
from .features_sumformer import SumformerMLPFeatures
from .mixers_sumformer import AttentionMixer, LinformerMixer, SumformerMixer
from .modeling_sumformer import SumformerMLP, SumformerModel


@dataclass(frozen=True)
class AttentionConstruction:
    """A model of two blocks that computes a Sumformer: the last `output_size` channels of `model(input_features=x)`."""

    model: SumformerModel
    output_size: int

    def __call__(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [batch, n, hidden_size] -> alike, as the Sumformer gives it."""
        outputs = self.model(input_features=x, attention_mask=attention_mask)
        return outputs.last_hidden_state[..., -self.output_size :]


@torch.no_grad()
def attention_as_sum(sumformer: SumformerMixer, mixer: str, num_elements: int) -> AttentionConstruction:
    """A Transformer, Linformer or Performer whose one attention layer is the sum of a given Sumformer.

    The residual stream has channels for x, phi(x), the sum and the output. The first block's attention is switched off (its
    output projection is 0), and its MLP is phi. In the second block W_Q = W_K = 0, so that all weights are 1 / n, whichever
    attention it is: softmax of equal scores is uniform, the random features of 0 are equal, and Linformer's projections are
    given rows of 1 / n. W_V takes phi, W_O writes n times the mean, and the MLP is psi.

    The cost of the model is that of phi and psi, not of attention: the hidden layers are as wide as theirs.

    Args:
        sumformer: not causal, with an MLP phi and an MLP psi.
        mixer: "softmax", "linformer" or "performer".
        num_elements: n. Sets of other sizes (or with masked elements) come out right where the aggregation is the mean and the
            mixer softmax or Performer.

    Raises:
        ValueError: a Sumformer or a mixer that this is not for.
        ArithmeticError: the two differ on random elements, which would be a defect.
    """
    phi, psi = sumformer.phi, sumformer.psi
    if not isinstance(phi, SumformerMLPFeatures) or psi.product_proj is not None or sumformer.causal:
        raise ValueError("the construction is for Sumformers with phi_type='mlp', psi_type='mlp' and causal=False")
    if mixer not in ("softmax", "linformer", "performer"):
        raise ValueError(f"mixer={mixer!r} has no attention: choose softmax, linformer or performer")
    width, latent = phi.fc1.in_features, phi.fc2.out_features
    element = slice(0, width)
    features, sums = slice(width, width + latent), slice(width + latent, width + 2 * latent)
    output = slice(width + 2 * latent, 2 * width + 2 * latent)
    config = SumformerConfig(
        mixer=mixer,
        feature_size=width,
        hidden_size=output.stop,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=max(phi.fc1.out_features, psi.token_proj.out_features),
        max_linformer_len=num_elements,
        linformer_size=4,
        num_random_features=16,
        use_norm=False,
        hidden_act=sumformer.hidden_act,
    )
    model = SumformerModel(config).eval().to(phi.fc1.weight)
    for parameter in model.parameters():
        parameter.zero_()
    model.feature_projection.weight[element] = torch.eye(width).to(phi.fc1.weight)
    first, second = model.layers
    _set_hidden(first.mlp, phi.fc1.bias, (phi.fc1.weight, element))
    _set_output(first.mlp, phi.fc2, features)
    attention = second.mixer
    assert isinstance(attention, AttentionMixer)
    attention.v_proj.weight[sums, features] = torch.eye(latent).to(phi.fc1.weight)
    factor = {"sum": float(num_elements), "mean": 1.0, "scaled": num_elements**0.5}[sumformer.aggregation]
    attention.o_proj.weight[sums, sums] = factor * torch.eye(latent).to(phi.fc1.weight)
    if isinstance(attention, LinformerMixer):
        for projection in (attention.e, attention.f):
            projection.fill_(1 / num_elements)
    _set_hidden(second.mlp, psi.token_proj.bias, (psi.token_proj.weight, element), (psi.sum_proj.weight, sums))
    _set_output(second.mlp, psi.out_proj, output)

    construction = AttentionConstruction(model, width)
    x = torch.randn(2, num_elements, width, generator=torch.Generator().manual_seed(0)).to(phi.fc1.weight)
    wanted = sumformer(x)
    error = (construction(x) - wanted).abs().max().item() / wanted.abs().max().clamp(min=1).item()
    if not error <= 1e5 * torch.finfo(x.dtype).eps:
        raise ArithmeticError(f"the constructed {mixer} model differs from the Sumformer by {error:.1e}")
    return construction


def _set_hidden(mlp: SumformerMLP, bias: torch.Tensor, *weights: tuple[torch.Tensor, slice]) -> None:
    """The hidden layer of an MLP: weights that read some channels each, and a bias; what is wider than they are stays 0."""
    mlp.fc1.bias[: bias.shape[0]] = bias
    for weight, channels in weights:
        mlp.fc1.weight[: weight.shape[0], channels] = weight


def _set_output(mlp: SumformerMLP, output: torch.nn.Linear, channels: slice) -> None:
    mlp.fc2.weight[channels, : output.in_features] = output.weight
    mlp.fc2.bias[channels] = output.bias
