"""`geobased train streetclip`, `pigeon` and `pigeon-embeddings`: each hands its arguments to a training module."""

import json
from typing import Any

import typer

from .options import epilog
from .train import PASS_THROUGH, _HelpFormatter

STREETCLIP_EXAMPLES = (
    "geobased train streetclip --model openai/clip-vit-base-patch32 --data photos.csv --output_dir runs/streetclip"
    " --per_device_train_batch_size 1024 --chunk_size 64",
    "geobased train streetclip --config clip.json --processor ./processor --data shards/ --output_dir runs/new",
    "geobased train streetclip --model … --data photos.csv --output_dir runs/streetclip --resume",
)
PIGEON_EXAMPLES = (
    "geobased train pigeon --model geolocal/StreetCLIP --embeddings runs/embeddings --output_dir runs/pigeon --prototypes",
    "geobased train pigeon --model runs/streetclip/final --data photos.csv --trainable_layers 1 --output_dir runs/pigeon",
    'geobased train pigeon … --heads \'[{"name": "elevation", "kind": "regression", "size": 1, "weight": 8}]\'',
)
EMBEDDINGS_EXAMPLES = (
    "geobased train pigeon-embeddings --model geolocal/StreetCLIP --data photos.csv --output_dir runs/embeddings",
    "accelerate launch -m geobased.cli.main train pigeon-embeddings …   (several GPUs; an interrupted run goes on)",
)
SUMMARY = ("parameters", "steps", "stopped_early", "seconds", "split", "prototypes", "metrics")


def _parse(context: typer.Context, arguments_class: type, examples: tuple[str, ...]) -> Any:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        arguments_class,  # type: ignore[arg-type]
        prog=context.command_path,
        description=context.command.help,
        epilog=epilog(*examples).replace("\b\n", ""),
        formatter_class=_HelpFormatter,
    )
    (arguments,) = parser.parse_args_into_dataclasses(args=context.args)
    return arguments


def _print_summary(log: dict[str, Any]) -> None:
    print(json.dumps({key: value for key, value in log.items() if key in SUMMARY}, indent=1, ensure_ascii=False))


def streetclip(context: typer.Context) -> None:
    """Pretrain StreetCLIP: CLIP on images and captions of their places, with blocks of the Earth held out."""
    from geobased.training import streetclip_pretraining

    arguments = _parse(context, streetclip_pretraining.StreetCLIPArguments, STREETCLIP_EXAMPLES)
    _print_summary(streetclip_pretraining.train(arguments))


def pigeon(context: typer.Context) -> None:
    """Train PIGEON's heads on a frozen or fine-tuned tower, from images or precomputed embeddings, with blocks held out."""
    from geobased.training import pigeon_training

    arguments = _parse(context, pigeon_training.PigeonArguments, PIGEON_EXAMPLES)
    _print_summary(pigeon_training.train(arguments))


def pigeon_embeddings(context: typer.Context) -> None:
    """Compute the embeddings of images once, for `geobased train pigeon --embeddings`; an interrupted run goes on."""
    from geobased.training import pigeon_embeddings as module

    result = module.embed(_parse(context, module.PigeonEmbeddingArguments, EMBEDDINGS_EXAMPLES))
    print(json.dumps(result | {"skipped": len(result["skipped"])}, indent=1))


def register(app: typer.Typer) -> None:
    """Adds the commands to `geobased train`."""
    for name, command, examples in (
        ("streetclip", streetclip, STREETCLIP_EXAMPLES),
        ("pigeon", pigeon, PIGEON_EXAMPLES),
        ("pigeon-embeddings", pigeon_embeddings, EMBEDDINGS_EXAMPLES),
    ):
        app.command(name, context_settings=PASS_THROUGH, add_help_option=False, epilog=epilog(*examples))(command)
