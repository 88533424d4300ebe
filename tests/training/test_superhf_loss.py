import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file

from geobased.training.superhf_loss import Predictions, selected_texts, superhf_loss

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "superhf"
GOLDEN = json.loads((FIXTURES / "golden.json").read_text())
AS_PUBLISHED = {"kl_reduction": "sum", "kl_one_late": True}


@pytest.fixture(scope="module")
def published(reference_tensors):
    """Texts padded at the right as the trainer holds them, prompt lengths, and the logits of left-padded texts."""
    tensors = reference_tensors("superhf/kl_inputs")
    mask = tensors["attention_mask"]
    source = (torch.arange(mask.shape[1]) + mask.shape[1] - mask.sum(1, keepdim=True)) % mask.shape[1]
    at_the_right = {name: tensors[name].gather(1, source) for name in ("input_ids", "attention_mask")}
    return at_the_right, torch.tensor(GOLDEN["prompt_token_lengths"]), tensors


def random_predictions(hidden_size=6, vocab=11, rows=2, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, hidden_size, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, generator=generator, requires_grad=True)
    bias = torch.randn(vocab, generator=generator, requires_grad=True)
    return hidden, weight, bias


def test_reproduces_the_published_labels_with_their_leak(published):
    texts, prompt_lengths, tensors = published
    batch = selected_texts(**texts, prompt_lengths=prompt_lengths, reproduce_defects=True)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(batch, name), tensors[name]), name


@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.35])
def test_reproduces_the_published_losses(published, beta):
    texts, prompt_lengths, tensors = published
    policy, reference = tensors["logits_policy"], None if beta < 0 else Predictions(tensors["logits_ref"])
    labels = selected_texts(**texts, prompt_lengths=prompt_lengths, reproduce_defects=True).labels
    terms = superhf_loss(Predictions(policy), reference, labels, beta=max(beta, 0.0), **AS_PUBLISHED)
    assert terms.loss.item() == pytest.approx(GOLDEN["finetune_losses"][f"kl={beta},minibatch=3"]["avg_loss"], abs=1e-5)
    # alone, a text has no padding and nothing leaks
    losses = []
    for row, length in enumerate(texts["attention_mask"].sum(1).tolist()):
        one = {name: value[row : row + 1] for name, value in texts.items()}
        labels = selected_texts(**one, prompt_lengths=prompt_lengths[row : row + 1], reproduce_defects=True).labels
        own = Predictions(policy[row : row + 1, -length:])
        other = None if reference is None else Predictions(tensors["logits_ref"][row : row + 1, -length:])
        losses.append(superhf_loss(own, other, labels, beta=max(beta, 0.0), **AS_PUBLISHED).loss.item())
    expected = GOLDEN["finetune_losses"][f"kl={beta},minibatch=1"]["avg_loss"]
    assert sum(losses) / len(losses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("direction", "one_late", "name"),
    [
        ("forward", True, "forward_KL(ref||policy)_unshifted"),
        ("reverse", True, "reverse_KL(policy||ref)_unshifted"),
        ("forward", False, "forward_KL_shifted(logits at t-1 for label t)"),
        ("reverse", False, "reverse_KL_shifted"),
    ],
)
def test_reproduces_each_divergence(published, direction, one_late, name):
    _, _, tensors = published
    for row, expected in enumerate(GOLDEN["variants_per_example"][name]):
        one = [Predictions(tensors[key][row : row + 1]) for key in ("logits_policy", "logits_ref")]
        labels = tensors["labels"][row : row + 1]
        terms = superhf_loss(*one, labels, beta=1.0, kl_direction=direction, kl_one_late=one_late)
        assert (terms.kl_sum / terms.num_kl_tokens).item() == pytest.approx(expected, abs=1e-5)


def test_pure_divergences():
    tensors = load_file(FIXTURES / "pure_kl.safetensors")
    policy, reference = (Predictions(tensors[f"{name}_logits"][None]) for name in ("policy", "ref"))
    labels = torch.zeros(1, 5, dtype=torch.long)
    for direction, name in (("forward", "superhf KLDivLoss(batchmean,log_target)(policy,ref)"), ("reverse", "reverse")):
        terms = superhf_loss(policy, reference, labels, beta=1.0, kl_direction=direction, kl_one_late=True)
        assert (terms.kl_sum / 5).item() == pytest.approx(GOLDEN["pure_kl"][name], abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunks_equal_full_logits_in_value_and_gradient(direction, reduction):
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100, -100], [-100, 1, 2, 3, 10, 0, 7]])
    results = []
    for chunked in (True, False):
        hidden, weight, bias = random_predictions()
        other, other_weight, other_bias = (value.detach() for value in random_predictions(seed=1))
        policy, reference = Predictions(hidden, weight, bias), Predictions(other, other_weight, other_bias)
        if not chunked:
            policy, reference = Predictions(hidden @ weight.T + bias), Predictions(other @ other_weight.T + other_bias)
        options = {"beta": 0.5, "kl_direction": direction, "kl_reduction": reduction, "inverse_loss_penalty": 0.1}
        terms = superhf_loss(policy, reference, labels, **options)
        terms.loss.backward()
        results.append((terms.loss.detach(), terms.entropy_sum, terms.kl_sum, hidden.grad, weight.grad, bias.grad))
    for chunked, full in zip(*results, strict=True):
        torch.testing.assert_close(chunked, full, atol=1e-5, rtol=1e-5)


def test_only_completions_are_labels_whatever_the_padding():
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [1, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    texts = selected_texts(ids, mask, torch.tensor([2, 1, 99]))
    assert texts.input_ids.shape == (3, 4)
    assert texts.labels.tolist() == [[-100, -100, 7, 8], [-100, 6, -100, -100], [-100] * 4]


def test_nothing_to_train_on_gives_a_zero_that_still_has_gradients():
    hidden, weight, bias = random_predictions()
    policy = Predictions(hidden, weight, bias)
    reference = Predictions(hidden.detach(), weight.detach(), bias.detach())
    terms = superhf_loss(policy, reference, torch.full((2, 7), -100), beta=0.3)
    terms.loss.backward()
    assert terms.loss.item() == 0 and hidden.grad.abs().sum() == 0 and weight.grad is not None


def test_divergence_without_a_reference_is_an_error():
    hidden, weight, bias = random_predictions()
    with pytest.raises(ValueError, match=r"beta=0\.35 needs a reference"):
        superhf_loss(Predictions(hidden, weight, bias), None, torch.zeros(2, 7, dtype=torch.long), beta=0.35)
