"""The card of a trained model: what it was trained on and what was measured, nothing else."""

from typing import Any

_CARD = """---
library_name: geobased
pipeline_tag: {task}
tags:
- image-geolocation
---

# {title}

{about}

Trained by `geobased train {command}` for {steps:,} steps of {images_per_step:,} images.

## Data

{images:,} images to train on, {held_out:,} held out for evaluation: {blocks}.
{skipped} images could not be read and were left out.

## Measured on the held-out blocks

{metrics}

## Limits

Images of other kinds and places than those of the training data were not measured. Do not use it to find out where people are
who have not agreed to it.
"""


def model_card(*, title: str, about: str, command: str, task: str, log: dict[str, Any]) -> str:
    """The card as Markdown, from what the run's log says.

    Args:
        title, about: heading and first paragraph.
        command: the command after `geobased train`.
        task: pipeline tag.
        log: of the run: steps, images_per_step, split (of `split_by_blocks`, or None of a stream), skipped_images, metrics.
    """
    split = log["split"]
    blocks = (
        "a stream, split by blocks"
        if split is None
        else (
            f"blocks of {split['degrees']:g} degrees, {split['evaluation_blocks']} of"
            f" {split['evaluation_blocks'] + split['training_blocks']}"
        )
    )
    rows = [f"| {name.removeprefix('eval_').replace('_', ' ')} | {value:.4g} |" for name, value in log["metrics"].items()]
    return _CARD.format(
        title=title,
        about=about,
        command=command,
        task=task,
        steps=log["steps"],
        images_per_step=log["images_per_step"],
        images=split["training_images"] if split else log["steps"] * log["images_per_step"],
        held_out=split["evaluation_images"] if split else 0,
        blocks=blocks,
        skipped=len(log["skipped_images"]) or "No",
        metrics="\n".join(["| metric | value |", "|---|---:|", *rows]) if rows else "Nothing was held out.",
    )


__all__ = ["model_card"]
