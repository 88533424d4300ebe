"""Label embeddings: what the model gives one by one, once only, and never another model's."""

import threading

import pytest
import torch
from transformers import CLIPModel, CLIPVisionModel

from geobased.modeling_streetclip import StreetCLIPModel
from geobased.modeling_streetclip.label_embeddings import LabelEmbedder

LABELS = ["A photo in Peru.", "A photo in the United Arab Emirates.", "Oslo", "A photo in Peru."]


@pytest.fixture
def model(checkpoint) -> StreetCLIPModel:
    """Of one's own: its weights may be changed."""
    return StreetCLIPModel.from_pretrained(checkpoint)


@pytest.fixture
def calls(model, monkeypatch) -> list[int]:
    """Numbers of texts that the model was called with."""
    numbers: list[int] = []
    forward = model.get_text_features

    def counted(input_ids, **options):
        numbers.append(len(input_ids))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "get_text_features", counted)
    return numbers


def one_by_one(model, tokenizer, texts) -> torch.Tensor:
    """What transformers gives for each text alone."""
    with torch.no_grad():
        features = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_embeddings_are_those_of_each_text_alone(model, tokenizer, batch_size):
    embedder = LabelEmbedder(model, tokenizer, cache_dir=None, batch_size=batch_size)
    [embeddings] = embedder.embed_sets([LABELS])
    torch.testing.assert_close(embeddings, one_by_one(model, tokenizer, LABELS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("eos_token_id", [2, None], ids=["legacy", "own_end_token"])
def test_padding_is_exact_under_both_ways_of_pooling(model, tokenizer, eos_token_id):
    model.text_model.eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    [embeddings] = LabelEmbedder(model, tokenizer, cache_dir=None).embed_sets([LABELS])
    torch.testing.assert_close(embeddings, one_by_one(model, tokenizer, LABELS), rtol=1e-5, atol=1e-5)
    assert (embeddings[0] - embeddings[1]).norm() > 0.01


def test_texts_are_embedded_once(model, tokenizer, calls):
    embedder = LabelEmbedder(model, tokenizer, cache_dir=None)
    first, second = embedder.embed_sets([LABELS, ["Oslo", "Lima"]])
    assert calls == [4]  # three different labels, and Lima
    assert torch.equal(first[2], second[0])
    assert torch.equal(first[0], first[3])


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_second_embedder_reads_what_the_first_wrote(model, tokenizer, calls, tmp_path):
    [first] = LabelEmbedder(model, tokenizer, cache_dir=tmp_path).embed_sets([LABELS])
    assert calls == [3]
    assert len(list(tmp_path.iterdir())) == 1
    [second] = LabelEmbedder(model, tokenizer, cache_dir=str(tmp_path)).embed_sets([LABELS])
    assert calls == [3]
    assert torch.equal(first, second)


def test_only_sets_that_are_missing_are_embedded(model, tokenizer, calls, tmp_path):
    embedder = LabelEmbedder(model, tokenizer, cache_dir=tmp_path)
    [oslo] = embedder.embed_sets([["Oslo"]])
    results = embedder.embed_sets([["Lima"], ["Oslo"], ["Rome", "Bonn"]])
    assert calls == [1, 3]
    assert torch.equal(results[1], oslo)
    assert [len(result) for result in results] == [1, 1, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_other_labels_prompts_and_orders_are_other_files(model, tokenizer, calls, tmp_path):
    embedder = LabelEmbedder(model, tokenizer, cache_dir=tmp_path)
    for labels in (["Oslo", "Rome"], ["Rome", "Oslo"], ["A photo in Oslo", "A photo in Rome"], ["Oslo"], ["Oslo, Rome"]):
        embedder.embed_sets([labels])
    assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "name", ["text_projection.weight", "text_model.encoder.layers.1.mlp.fc1.bias", "text_model.embeddings.token_embedding.weight"]
)
def test_changed_weights_are_another_model(model, tokenizer, calls, tmp_path, name):
    before = LabelEmbedder(model, tokenizer, cache_dir=tmp_path)
    [old] = before.embed_sets([LABELS])
    with torch.no_grad():
        model.get_parameter(name).flatten()[-1].add_(1.0)
    after = LabelEmbedder(model, tokenizer, cache_dir=tmp_path)
    assert after.fingerprint != before.fingerprint
    after.embed_sets([LABELS])
    assert calls == [3, 3]
    assert len(old) == 4


def test_what_texts_do_not_depend_on_is_not_in_the_fingerprint(model, clip, tokenizer):
    of_clip = LabelEmbedder(clip, tokenizer).fingerprint
    assert LabelEmbedder(model, tokenizer).fingerprint == of_clip
    with torch.no_grad():
        model.visual_projection.weight.add_(1.0)
        model.vision_model.post_layernorm.bias.add_(1.0)
    assert LabelEmbedder(model, tokenizer).fingerprint == of_clip
    tokenizer(["a", "long text"], padding=True, truncation=True)  # settings of a call, not of the tokenizer
    assert LabelEmbedder(model, tokenizer).fingerprint == of_clip


def test_other_precisions_and_tokenizers_are_in_the_fingerprint(checkpoint, clip, tokenizer):
    half = CLIPModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    other = type(tokenizer).from_pretrained(checkpoint)
    other.add_tokens(["Reykjavik"])
    prints = [LabelEmbedder(*pair).fingerprint for pair in ((clip, tokenizer), (half, tokenizer), (clip, other))]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("damage", ["empty", "truncated", "other_tensor", "other_shape"])
def test_damaged_files_are_made_again(model, tokenizer, calls, tmp_path, damage):
    from safetensors.torch import save_file

    [expected] = LabelEmbedder(model, tokenizer, cache_dir=tmp_path).embed_sets([LABELS])
    [file] = tmp_path.iterdir()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "other_tensor":
        save_file({"weights": torch.zeros(4, 16)}, file)
    else:
        save_file({"embeddings": torch.zeros(3, 16)}, file)
    for _ in range(2):
        [embeddings] = LabelEmbedder(model, tokenizer, cache_dir=tmp_path).embed_sets([LABELS])
        assert torch.equal(embeddings, expected)
    assert calls == [3, 3]


def test_a_write_that_fails_leaves_no_file(model, tokenizer, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("geobased.modeling_streetclip.label_embeddings.os.replace", fail)
    [embeddings] = LabelEmbedder(model, tokenizer, cache_dir=tmp_path).embed_sets([LABELS])
    assert embeddings.shape == (4, 16)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_does_not_stop(model, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    [embeddings] = LabelEmbedder(model, tokenizer, cache_dir=tmp_path / "file" / "folder").embed_sets([LABELS])
    assert embeddings.shape == (4, 16)


def test_many_writers_of_one_folder(model, tokenizer, tmp_path):
    results: list[torch.Tensor] = []

    def work() -> None:
        results.extend(LabelEmbedder(model, tokenizer, cache_dir=tmp_path).embed_sets([LABELS]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        torch.testing.assert_close(result, results[0])
    assert len(list(tmp_path.iterdir())) == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long(model, tokenizer):
    embedder = LabelEmbedder(model, tokenizer, cache_dir=None)
    with pytest.raises(ValueError, match="has 102 tokens but the model reads 77: shorten the prompt"):
        embedder.embed_sets([["Oslo", "x" * 100]])


def test_bad_arguments(model, clip, tokenizer):
    with pytest.raises(ValueError, match="set 1 of 2 has no texts"):
        LabelEmbedder(model, tokenizer, cache_dir=None).embed_sets([["Oslo"], []])
    with pytest.raises(ValueError, match="batch_size=0"):
        LabelEmbedder(model, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="CLIPVisionModel has no get_text_features"):
        LabelEmbedder(CLIPVisionModel(clip.config.vision_config), tokenizer)
