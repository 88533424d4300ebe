"""A tiny random CLIP on disk, as a checkpoint of CLIP looks: config.json, pytorch_model.bin, tokenizer, image processor."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.modeling_streetclip import register_streetclip

register_streetclip()

TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IMAGE_SIZE = 28


def clip_config(vocab_size: int = 99, eos_token_id: int = 2, bos_token_id: int = 0) -> CLIPConfig:
    text = dict(TOWER, vocab_size=vocab_size, eos_token_id=eos_token_id, bos_token_id=bos_token_id)
    return CLIPConfig(
        text_config=text,
        vision_config=dict(TOWER, image_size=IMAGE_SIZE, patch_size=7),
        projection_dim=16,
        initializer_factor=3.0,
    )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """Characters as tokens, in the files of CLIP's tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    words = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Random weights; the text configuration has the legacy end token 2, as StreetCLIP's."""
    torch.manual_seed(0)
    return CLIPModel(clip_config(len(tokenizer))).eval()


@pytest.fixture(scope="session")
def checkpoint(clip: CLIPModel, tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `pytorch_model.bin` alone, and the position ids that old checkpoints hold. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("clip")
    clip.config.architectures = ["CLIPModel"]
    clip.config.save_pretrained(folder)
    positions = {"text_model.embeddings.position_ids": 77, "vision_model.embeddings.position_ids": 17}
    state = dict(clip.state_dict()) | {name: torch.arange(length)[None] for name, length in positions.items()}
    torch.save(state, folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts(tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    return tokenizer(["A photo in Peru.", "A photo in the Netherlands."], padding=True, return_tensors="pt")
