"""`geobased locate`: where images were taken."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import BAD_INPUT, CommandError
from .options import Debug, Device, Json, complete_model
from .sources import DEFAULT_GEOLOCALIZER, loading, parse_device, parse_dtype, quiet_transformers, resolve_model

if TYPE_CHECKING:
    from geobased.modeling_streetclip.zero_shot import SearchLevel
    from geobased.pipelines import ImageGeolocalizationPipeline

EXAMPLES = (
    "geobased locate crop.png --map map.html",
    "geobased locate photo.jpg --model geolocal/StreetCLIP",
    "geobased locate *.jpg --model ./my-pigeon --top-k 3 --map places.html",
    "geobased locate https://example.org/photo.jpg --model ./my-pigeon --json",
)
LEVEL_NAMES = ("country", "region", "city")
# fewer take seconds
PROGRESS_FROM = 8
OVERHEAD = "pictures of the Earth from space, 2 to 8 degrees across, and nothing else"  # what earthclip-mini knows

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A shipped model, a folder or a Hub id: PIGEON, StreetCLIP or another CLIP. The default is for pictures from space;"
        " geolocal/StreetCLIP is for photos.",
        autocompletion=complete_model,
    ),
]
Levels = Annotated[
    str | None,
    typer.Option(
        help="Zero-shot search: the way down, such as country or country,region,city; country,city if not given.",
        show_default=False,
    ),
]
Beam = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Zero-shot search: places of each level that are gone on from; 1 is fastest. All if not given.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode images; one per core if not given.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto: the checkpoint's, on a CPU float32.")]


def locate(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files or URLs, one or many.")],
    model: Model = DEFAULT_GEOLOCALIZER,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Places to show of each image.")] = 5,
    json_output: Json = False,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="Draw a map: .html (opens offline) or .png.", show_default=False)
    ] = None,
    levels: Levels = None,
    beam: Beam = None,
    batch_size: BatchSize = 16,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Tell where images were taken, by their pixels alone.

    Shows the likeliest places of each image with their probabilities and error radii. EXIF data is never used nor shown. An image
    that cannot be read is reported and the others go on; the exit code is then 2.
    """
    if map_file is not None:
        from geobased.pipelines.geolocalization_map import check_map_path

        check_map_path(map_file)
    pipe = load_geolocalizer(model, levels, beam, device, dtype)
    results = locate_images(pipe, images, batch_size, threads, top_k=top_k)
    report = [_entry(name, result) for name, result in zip(images, results, strict=True)]
    if map_file is not None:
        _draw(map_file, report)
    if json_output:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)
        if model == DEFAULT_GEOLOCALIZER and any(entry.get("abstain") for entry in report):
            photos = "for photos taken on the ground pass --model geolocal/StreetCLIP"
            print(f"note: {model} knows {OVERHEAD}: {photos}", file=sys.stderr)
    failed = [entry for entry in report if "error" in entry]
    for entry in failed:
        print(f"error: {entry['error']}", file=sys.stderr)
    if failed:
        raise typer.Exit(BAD_INPUT)


def load_geolocalizer(
    model: str, levels: "str | Sequence[SearchLevel] | None", beam: int | None, device: str, dtype: str
) -> "ImageGeolocalizationPipeline":
    """The pipeline for a model; all that can be wrong with it ends in a sentence."""
    names: Any = [name.strip() for name in levels.split(",")] if isinstance(levels, str) else levels
    if unknown := [name for name in names or [] if isinstance(name, str) and name not in LEVEL_NAMES]:
        raise CommandError(f"--levels has {unknown[0]!r}: give some of {', '.join(LEVEL_NAMES)}, separated by commas")
    wanted, place, source = parse_dtype(dtype), parse_device(device), resolve_model(model)

    import torch
    from transformers import AutoConfig, pipeline

    from geobased.pipelines import ImageGeolocalizationPipeline

    with loading(model, source):
        if wanted == "auto" and place.type == "cpu":
            stored = AutoConfig.from_pretrained(source).dtype
            wanted = torch.float32 if stored in (None, torch.float16, torch.bfloat16) else wanted
        # the class is given so that a folder which brings a copy of it loads without running that
        pipe: Any = pipeline(
            "image-geolocalization",  # type: ignore[call-overload]
            model=source,
            pipeline_class=ImageGeolocalizationPipeline,
            device=place,
            dtype=wanted,
            trust_remote_code=False,
            levels=names,
            beam=beam,
        )
    return pipe


def locate_images(
    pipe: "ImageGeolocalizationPipeline", images: Sequence[Any], batch_size: int, threads: int | None, **options: Any
) -> list[Any]:
    """What the pipeline gives for each image, with a progress bar where there are many."""
    from tqdm import tqdm

    with quiet_transformers():
        # an iterator, so that results come as they are ready
        answers = pipe(iter(images), batch_size=min(batch_size, len(images)), num_workers=threads, **options)
        few = len(images) < PROGRESS_FROM
        return list(tqdm(answers, total=len(images), desc="locating", unit="image", disable=few))


def _entry(image: str, result: Any) -> dict[str, Any]:
    if isinstance(result, dict):
        return {"image": image, "predictions": [], "error": result["error"]}
    return {"image": image, "predictions": result, "abstain": result[0]["abstain"]}


def _show(report: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from geobased.pipelines.geolocalization_answers import place_title

    # a pipe gets whole lines, a terminal what fits
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for entry in report:
        if "error" in entry:
            continue
        title = Text(entry["image"], style="bold")
        if entry["abstain"]:
            title.append("  too uncertain: the model would rather not say", style="not bold yellow")
        # not the table's own title, which would be broken to the table's width
        console.print(title, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("", justify="right")
        table.add_column("place", overflow="fold")
        for heading in ("probability", "latitude", "longitude", "radius"):
            table.add_column(heading, justify="right", no_wrap=True)
        for rank, place in enumerate(entry["predictions"], 1):
            numbers = (f"{place['latitude']:.4f}", f"{place['longitude']:.4f}", f"{place['error_radius_km']:,.0f} km")
            table.add_row(str(rank), Text(place_title(place)), f"{place['score']:.1%}", *numbers)
        console.print(table)


def _draw(path: Path, report: list[dict[str, Any]]) -> None:
    from geobased.pipelines.geolocalization_map import MAX_SECTIONS, LocatedImage, save_map, thumbnail

    def wanted(number: int, entry: dict[str, Any]) -> bool:
        """Of an image that the page shows; what would have to be downloaded again has none."""
        shown = path.suffix.lower() == ".html" and number < MAX_SECTIONS
        return shown and bool(entry["predictions"]) and Path(entry["image"]).is_file()

    images = [
        LocatedImage(
            entry["image"],
            entry["predictions"],
            entry.get("error"),
            thumbnail(entry["image"]) if wanted(number, entry) else None,
        )
        for number, entry in enumerate(report)
    ]
    save_map(path, images)
    print(f"map: {path}", file=sys.stderr)
