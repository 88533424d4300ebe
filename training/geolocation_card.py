"""The card of a trained model: what it was trained on and what was measured, nothing else."""

from typing import Any

from huggingface_hub import ModelCardData

from geobased.model_cards import card_from_template


def model_card(
    *,
    title: str,
    about: str,
    task: str,
    config: dict[str, Any],
    log: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
) -> str:
    """The card as Markdown, from what the run's log says.

    Args:
        title, about: heading and first paragraph.
        task: pipeline tag.
        config: of the model.
        log: of the run: steps, images_per_step, split (of `split_by_blocks`, or None of a stream), skipped_images, metrics.
        evaluation: of the held-out blocks (`EvaluationResult.to_dict`), in place of the log's metrics.
    """
    card_data = ModelCardData(library_name="geobased", pipeline_tag=task, tags=["image-geolocation"])
    card = card_from_template(
        "geolocalization",
        card_data,
        model_name=title,
        repo_id=title,
        about=about,
        config=config,
        training=log,
        evaluation=evaluation,
        evaluated_on="Held-out blocks",
    )
    return str(card)


__all__ = ["model_card"]
