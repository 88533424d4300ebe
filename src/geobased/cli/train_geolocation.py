"""`geobased train streetclip`, `pigeon` and `pigeon-embeddings`: each hands its arguments to a training module."""

from typing import Any

import typer

from .train import add_training, run_training

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


def _summary(log: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in log.items() if key in SUMMARY}


def streetclip(context: typer.Context) -> None:
    """Pretrain StreetCLIP: CLIP on images and captions of their places, with blocks of the Earth held out."""
    from geobased.training import streetclip_pretraining as module

    run_training(context, module.StreetCLIPArguments, lambda given: _summary(module.train(given)), STREETCLIP_EXAMPLES)


def pigeon(context: typer.Context) -> None:
    """Train PIGEON's heads on a frozen or fine-tuned tower, from images or precomputed embeddings, with blocks held out."""
    from geobased.training import pigeon_training as module

    run_training(context, module.PigeonArguments, lambda given: _summary(module.train(given)), PIGEON_EXAMPLES)


def pigeon_embeddings(context: typer.Context) -> None:
    """Compute the embeddings of images once, for `geobased train pigeon --embeddings`; an interrupted run goes on."""
    from geobased.training import pigeon_embeddings as module

    def work(arguments: Any) -> dict[str, Any]:
        result = module.embed(arguments)
        return result | {"skipped": len(result["skipped"])}

    run_training(context, module.PigeonEmbeddingArguments, work, EMBEDDINGS_EXAMPLES)


def register() -> None:
    """Adds the commands to `geobased train`."""
    add_training("streetclip", streetclip, STREETCLIP_EXAMPLES)
    add_training("pigeon", pigeon, PIGEON_EXAMPLES)
    add_training("pigeon-embeddings", pigeon_embeddings, EMBEDDINGS_EXAMPLES)
