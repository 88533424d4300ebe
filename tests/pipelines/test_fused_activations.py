"""Fused activations change nothing that a model computes, saves or learns."""

import torch
from transformers import CLIPConfig, CLIPModel

from geobased.pipelines.fused_activations import FusedQuickGELUActivation, fuse_activations


def test_features_gradients_and_weights_stay_the_same():
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "hidden_act": "gelu", "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=8)
    torch.manual_seed(0)
    model, pixels = CLIPModel(config).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weights = list(model.state_dict())

    def features_and_gradient():
        x = pixels.clone().requires_grad_()
        features = model.get_image_features(pixel_values=x).pooler_output
        return features, *torch.autograd.grad(features.square().sum(), x)

    expected = features_and_gradient()
    assert fuse_activations(model) == 2, "the text tower has another activation"
    assert sum(isinstance(module, FusedQuickGELUActivation) for module in model.modules()) == 2
    for value, before in zip(features_and_gradient(), expected, strict=True):
        torch.testing.assert_close(value, before, rtol=1e-12, atol=1e-14)
    assert list(model.state_dict()) == weights and fuse_activations(model) == 0
