"""Times `pipeline("image-geolocalization")` from the bytes of JPEG files to ranked places, beside transformers' own pipeline.

    python benchmarks/image_geolocalization.py [--images FOLDER] [--quick] [--output FOLDER]

The model has StreetCLIP's size (CLIP ViT-L/14 at 336 pixels, bfloat16) and random weights, and chooses among 233 countries.
Images are JPEG files of three sizes made of smooth noise, or those of `--images`; they are given as bytes, again and again. A row
is the time of one image; the stages alone (decoding in threads, preprocessing, the image tower) tell which of them bounds it.

The peer is transformers' zero-shot-image-classification with the same model, texts and files, timed over fewer images. Before
anything is timed, the places' probabilities of our pipeline must be those of the peer's labels; `relative_error` is the norm of
their difference. The floor is the tower's arithmetic at the measured rate of matrix products.
"""

import argparse
import functools
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results_file import OURS, print_table, results_folder, row, write_results
from timing import checked, measure_ceilings
from transformers import CLIPImageProcessorPil, CLIPModel, pipeline

from geobased.geography.gazetteer import countries
from geobased.modeling_streetclip.captions import in_country
from geobased.modeling_streetclip.configuration_streetclip import StreetCLIPConfig
from geobased.modeling_streetclip.image_decoding import decode_images, usable_cores
from geobased.modeling_streetclip.modeling_streetclip import StreetCLIPModel
from geobased.modeling_streetclip.zero_shot import SearchLevel
from geobased.pipelines.image_geolocalization import ImageGeolocalizationPipeline
from geobased.training.earthclip_data import caption_tokenizer

PEER = "transformers zero-shot pipeline"
LABELS, EDGE, PATCH = 233, 336, 14
PROMPT = "A Street View photo in {country}."
SIZES = ((600, 800), (768, 1024), (960, 1280))  # height, width
REPEATS = 4  # batches in a time of a single stage
MAX_ERROR = 0.05  # of probabilities: the towers' sums run in another order in bfloat16
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


class Countries:
    """A source of candidates: the first countries of the package's table."""

    def candidates(self, level: Any, *, within: Any = None, k: int | None = None) -> list[Any]:
        return list(countries()[:LABELS])


def noise_jpegs(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files whose spectrum falls as that of photos, of all `SIZES` in turn."""
    generator = np.random.default_rng(seed)
    files = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
        falling = 1 / np.maximum(np.hypot(y, x), 1 / width)
        channels = [np.fft.ifft2(np.fft.fft2(generator.standard_normal((height, width))) * falling).real for _ in range(3)]
        picture = np.stack(channels, axis=-1)
        picture = 128 + 50 * (picture - picture.mean()) / picture.std()
        file = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def each(function: Callable[[Any], Any], inputs: list[Any]) -> None:
    for values in inputs:
        function(values)


def images_per_second(function: Callable[[], Any], images: int) -> float:
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files in place of noise")
    parser.add_argument("--quick", action="store_true", help="fewer images; prints, and writes only with --output")
    parser.add_argument("--output", type=Path, help="folder for image_geolocalization.json (default: benchmarks/results/<gpu>)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    folder = arguments.output or (None if arguments.quick else results_folder())
    total, peer_total = (1024, 64) if arguments.quick else (4096, 256)
    batches = (128,) if arguments.quick else (32, 64, 128, 256)
    files = [p.read_bytes() for p in sorted(arguments.images.glob("*.jp*g"))] if arguments.images else noise_jpegs(24)
    jpegs = [files[n % len(files)] for n in range(total)]

    labels = [PROMPT.format(country=in_country(country.name)) for country in countries()[:LABELS]]
    tokenizer = caption_tokenizer(labels * 4, 1024, 77)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ends = {"pad_token_id": pad, "bos_token_id": end, "eos_token_id": end}
    text = {**TEXT, **ends, "vocab_size": 1024, "max_position_embeddings": 77}
    vision = {**VISION, "image_size": EDGE, "patch_size": PATCH}
    torch.manual_seed(0)
    config = StreetCLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    processor = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})
    with torch.device("cuda"):
        model: Any = StreetCLIPModel(config)
    model = model.to(torch.bfloat16).eval()
    model.set_attn_implementation("geobased")
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        config_of_clip = StreetCLIPConfig.from_pretrained(saved)
        clip: Any = CLIPModel.from_pretrained(saved, config=config_of_clip, dtype=torch.bfloat16)
    clip = clip.to("cuda").eval()
    clip.set_attn_implementation("sdpa")

    ours = ImageGeolocalizationPipeline(
        model=model,
        tokenizer=tokenizer,
        image_processor=processor,
        candidates=Countries(),
        levels=(SearchLevel("country", (PROMPT,)),),
        label_cache_dir=None,
        device=0,
    )
    peer: Any = pipeline(
        "zero-shot-image-classification", model=clip, tokenizer=tokenizer, image_processor=processor, device=0, framework="pt"
    )
    opened = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    options = {"candidate_labels": labels, "hypothesis_template": "{}"}
    theirs = [{score["label"]: score["score"] for score in scores} for scores in peer(opened[:8], batch_size=8, **options)]
    found = ours(files[:8], batch_size=4, top_k=LABELS)
    a = np.array([[next(p["score"] for p in image if p["country"] == c.name) for c in countries()[:LABELS]] for image in found])
    b = np.array([[scores[label] for label in labels] for scores in theirs])
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))

    ceilings = measure_ceilings()
    tokens, width = (EDGE // PATCH) ** 2 + 1, VISION["hidden_size"]
    flop = VISION["num_hidden_layers"] * tokens * (24 * width**2 + 4 * tokens * width)
    floor = ceilings.floor_milliseconds(0, flop)
    rows: list[dict[str, Any]] = []
    base = {"model": "ViT-L/14-336", "labels": LABELS, "images": "given" if arguments.images else "noise"}
    checked(error, MAX_ERROR, OURS, "image_geolocalization", base)

    def add(implementation: str, batch_size: int, speed: float, **extra: Any) -> None:
        case = {"batch_size": batch_size, **base}
        found = row("image_geolocalization", case, implementation, milliseconds=1e3 / speed, tokens=1, **extra)
        rows.append(found)
        print_table([found])
        print(f"  {speed:,.0f} images/s", flush=True)
        if folder is not None:
            write_results("image_geolocalization", rows, folder, ceilings=ceilings.as_dict(), cores=usable_cores())

    decoding = images_per_second(lambda: list(decode_images(jpegs)), total)
    print(f"decoding alone: {decoding:,.0f} images/s with {usable_cores()} threads", flush=True)
    for batch_size in batches:
        decoded: Any = list(decode_images(jpegs[: REPEATS * batch_size]))
        groups = [decoded[n * batch_size : (n + 1) * batch_size] for n in range(REPEATS)]
        read = functools.partial(ours.preprocessor, device="cuda", dtype=torch.bfloat16)
        preparing = images_per_second(functools.partial(each, read, groups), len(decoded))
        pixels = [read(groups[0])] * REPEATS
        with torch.inference_mode():
            embed = functools.partial(each, lambda values: model.get_image_features(pixel_values=values), pixels)
            tower = images_per_second(embed, len(decoded))
        stages = {
            "decoding_images_per_second": decoding,
            "preprocessing_images_per_second": preparing,
            "tower_images_per_second": tower,
        }
        print(f"batch {batch_size}: preprocessing alone {preparing:,.0f}, tower alone {tower:,.0f} images/s", flush=True)
        speed = images_per_second(functools.partial(ours, jpegs, batch_size=batch_size), total)
        add(OURS, batch_size, speed, floor_milliseconds=floor, relative_error=error, **stages)
    few = [opened[n % len(opened)] for n in range(peer_total)]
    add(PEER, 64, images_per_second(functools.partial(peer, few, batch_size=64, **options), peer_total))
    if folder is None:
        print("not written: --output FOLDER writes it anyway")


if __name__ == "__main__":
    main()
