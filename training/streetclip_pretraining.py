"""Pretrain StreetCLIP (Haas et al. 2023): CLIP on images and captions that say where they were taken, by transformers' Trainer.

- A caption is written for each image and epoch; negatives are the captions of the whole batch, over all processes.
- `chunk_size` is the memory's batch, `per_device_train_batch_size` the loss's: a gradient cache stands between them. Gradient
  accumulation adds no negatives.
- Blocks of the Earth are held out; on them the contrastive loss and the zero-shot accuracy of the country are measured.
- A row and its caption are functions of seed and number: a resumed run repeats the uninterrupted one loss by loss.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.trainer_utils import EvalPrediction

from geobased.modeling_streetclip import StreetCLIPConfig, StreetCLIPModel
from geobased.modeling_streetclip.captions import MIXTURES, PlaceDescription, in_country
from geobased.modeling_streetclip.image_processing_gpu import GpuImagePreprocessor
from geobased.training.artifacts import save_model_folder, write_json
from geobased.training.geolocation_card import model_card
from geobased.training.geolocation_dataset import split_by_blocks, stack_places
from geobased.training.geolocation_runs import (
    LOG_FILE,
    PLOT_FILE,
    CurveClock,
    GeolocationArguments,
    OrderedTrainer,
    plot_curve,
    skipped_images,
    training_data,
    training_log,
)
from geobased.training.geolocation_sources import GeolocationSource, RecordStream, open_sources
from geobased.training.run_control import FINAL_FOLDER, check_run_arguments, checkpoint_to_resume
from geobased.training.streetclip_captions import CaptionWriter, describe_rows, token_table
from geobased.training.streetclip_loss import MAX_LOGIT_SCALE, cached_backward, contrastive_loss

PROMPTS_PER_PASS = 256
UNKNOWN_COUNTRY = -1


@dataclass
class StreetCLIPArguments(GeolocationArguments):
    """Arguments of `train`. Defaults of the optimizer are those published for PIGEON's and StreetCLIP's pretraining."""

    model: str | None = field(default=None, metadata={"help": "CLIP checkpoint to start from: a folder or Hub id"})
    config: str | None = field(
        default=None, metadata={"help": "JSON file or string of a StreetCLIP configuration, to train from nothing instead"}
    )
    processor: str | None = field(
        default=None, metadata={"help": "folder or Hub id of tokenizer and image processor; the model's by default"}
    )
    mixture: str = field(default="streetclip", metadata={"help": f"captions: {', '.join(MIXTURES)}"})
    describe: str = field(
        default="gazetteer",
        metadata={"help": "where rows without a country get one: gazetteer (nearest town) or none (refused)"},
    )
    chunk_size: int = field(default=0, metadata={"help": "images computed at once by the gradient cache; 0 switches it off"})
    gather_negatives: bool = field(default=True, metadata={"help": "negatives from all processes, not this one's alone"})
    share_equal_captions: bool = field(
        default=False, metadata={"help": "equal captions of a batch all match; CLIP takes them for negatives"}
    )

    per_device_train_batch_size: int = field(default=256, metadata={"help": "images per device whose captions are negatives"})
    num_train_epochs: float = field(default=3.0, metadata={"help": "passes over the training images, without max_steps"})
    learning_rate: float = field(default=1e-6, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "linear, cosine, …"})
    warmup_steps: float = field(default=0.02, metadata={"help": "steps, or a fraction below 1, of linear warm-up"})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon"})
    weight_decay: float = field(default=1e-3, metadata={"help": "on matrices; norms and biases have none"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})


class CaptionCollator:
    """Items of the data sets -> a batch with captions.

    The batch has input_ids, attention_mask, pixel_values, coordinates, caption_ids [batch] (equal where captions are) and
    countries [batch] (numbers of `countries`, -1 for others).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        writer: CaptionWriter,
        countries: Sequence[str],
        describe: Any = "gazetteer",
    ) -> None:
        self.tokenizer, self.max_length, self.writer, self.describe = tokenizer, max_length, writer, describe
        self.numbers = {country: number for number, country in enumerate(countries)}

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = stack_places(items)
        captions, countries = [], []
        for item in items:
            place, writer = self._place(item), self.writer
            captions.append(writer.caption(place, item["row"], item["epoch"]))
            countries.append(self.numbers.get(in_country(place.country), UNKNOWN_COUNTRY) if place else UNKNOWN_COUNTRY)
        batch |= token_table(self.tokenizer, captions, self.max_length)
        batch["caption_ids"] = torch.tensor([_number(caption) for caption in captions])
        batch["countries"] = torch.tensor(countries)
        return batch

    def _place(self, item: dict[str, Any]) -> PlaceDescription | None:
        if "columns" not in item:
            return self.writer.places[item["row"]]
        columns = {name: [value] for name, value in item["columns"].items()}
        place = np.array([[item["latitude"], item["longitude"]]])
        return describe_rows(columns, place, self.describe, progress=False)[0]


class StreetCLIPTrainer(OrderedTrainer):
    """Trainer of the contrastive loss; `training_step` runs the gradient cache where `chunk_size` asks for it.

    Args:
        prompts: input_ids and attention_mask of one prompt per country, for the accuracy in evaluation; None measures the
            loss alone.
    """

    args: StreetCLIPArguments

    def __init__(self, *args: Any, prompts: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # a loss is the mean of its own batch, so the Trainer has to divide by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self.prompts = prompts
        self._prompt_embeddings: torch.Tensor | None = None
        self.add_callback(_LogitScaleLimit())

    def _embed(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised embeddings of images and texts, in float32."""
        names = ("input_ids", "attention_mask", "pixel_values")
        with self.compute_loss_context_manager():
            outputs = model(**{name: inputs[name] for name in names})
        return outputs.image_embeds.float(), outputs.text_embeds.float()

    def _logit_scale(self) -> nn.Parameter:
        return self.accelerator.unwrap_model(self.model).logit_scale

    def _contrast(self, images: torch.Tensor, texts: torch.Tensor, caption_ids: torch.Tensor, gather: bool) -> torch.Tensor:
        ids = caption_ids if self.args.share_equal_captions else None
        return contrastive_loss(images, texts, self._logit_scale().exp(), ids, gather)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Contrastive loss of a batch; over all processes in training."""
        images, texts = self._embed(model, inputs)
        gather = self.args.gather_negatives and model.training
        loss = self._contrast(images, texts, inputs["caption_ids"], gather)
        return (loss, {"image_embeds": images}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """A step's gradient and loss, as in transformers; in chunks if the batch is larger than `chunk_size`."""
        size = self.args.chunk_size
        if not size or len(inputs["pixel_values"]) <= size:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        caption_ids = inputs["caption_ids"]
        parts = {name: inputs[name].split(size) for name in ("input_ids", "attention_mask", "pixel_values")}
        chunks = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        steps = self.current_gradient_accumulation_steps

        def no_sync() -> AbstractContextManager:
            return self.accelerator.no_sync(model)

        loss = cached_backward(
            chunks,
            embed=lambda chunk: self._embed(model, chunk),
            loss=lambda images, texts: self._contrast(images, texts, caption_ids, self.args.gather_negatives) / steps,
            backward=self.accelerator.backward,
            loss_parameters=[p for p in [self._logit_scale()] if p.requires_grad],
            no_sync=no_sync,
        )
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(loss, number of the country whose prompt is nearest, number of the true country)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if self.prompts is None:
                return loss, None, None
            if self._prompt_embeddings is None:
                self._prompt_embeddings = self._embed_prompts(model, inputs["pixel_values"][:1])
            nearest = (outputs["image_embeds"] @ self._prompt_embeddings.T).argmax(1)
        return loss, nearest, inputs["countries"]

    def _embed_prompts(self, model: nn.Module, pixel_values: torch.Tensor) -> Any:
        # by the whole model's forward, the only one that sharded training has hooks on
        assert self.prompts is not None
        starts = range(0, len(self.prompts["input_ids"]), PROMPTS_PER_PASS)
        parts = []
        for start in starts:
            prompts = {name: values[start : start + PROMPTS_PER_PASS] for name, values in self.prompts.items()}
            parts.append(self._embed(model, self._prepare_inputs({**prompts, "pixel_values": pixel_values}))[1])
        return torch.cat(parts)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers, with the prompts embedded by the present weights."""
        self._prompt_embeddings = None
        return super().evaluate(*args, **kwargs)


class _LogitScaleLimit(TrainerCallback):
    """Keeps the temperature in CLIP's range."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def country_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Percent of images whose country's prompt is the nearest; images of unknown country do not count."""
    guessed, true = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    known = true != UNKNOWN_COUNTRY
    return {"country_accuracy": 100.0 * float((guessed == true)[known].mean())} if known.any() else {}


def load_model(arguments: StreetCLIPArguments) -> StreetCLIPModel:
    """The model to start from: a checkpoint, or random weights by `config`.

    Raises:
        ValueError: neither or both of model and config, or a file that is no configuration.
    """
    if (arguments.model is None) == (arguments.config is None):
        raise ValueError("give exactly one of --model (a checkpoint) and --config (to train from nothing)")
    if arguments.model is not None:
        return StreetCLIPModel.from_pretrained(arguments.model, dtype=torch.float32)
    text = str(arguments.config)
    fields = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    fields.pop("model_type", None)
    return StreetCLIPModel(StreetCLIPConfig(**fields))


def train(
    arguments: StreetCLIPArguments,
    source: GeolocationSource | None = None,
    stream: RecordStream | None = None,
    countries: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Train, and leave `final/` (model, processors, card), `training_log.json` and the learning curve in the output folder.

    Args:
        source, stream: images in place of `arguments.data`; a stream needs `max_steps`, and is read again from its start,
            decoding included, by a resumed run.
        countries: names that zero-shot evaluation chooses from; by default those of the data, of a stream StreetCLIP's list.

    Returns:
        the content of `training_log.json`.

    Raises:
        FileNotFoundError, FileExistsError: the output folder does not fit `resume`.
        ValueError: arguments that do not fit each other or the data.

    Example:
        >>> train(StreetCLIPArguments(output_dir="runs/streetclip", model="openai/clip-vit-base-patch32",
        ...     data=["photos/photos.csv"], per_device_train_batch_size=1024, chunk_size=64))  # doctest: +SKIP
    """
    _check(arguments, source, stream)
    checkpoint = checkpoint_to_resume(arguments.output_dir, arguments.resume)  # type: ignore[arg-type]
    set_seed(arguments.seed)
    model = load_model(arguments)
    processor = arguments.processor or arguments.model
    if processor is None:
        raise ValueError("--config needs --processor: a folder with tokenizer and image processor")
    tokenizer = AutoTokenizer.from_pretrained(processor)
    image_processor = CLIPImageProcessorPil.from_pretrained(processor)
    preprocess = GpuImagePreprocessor.from_image_processor(image_processor)
    text_config = _check_sizes(model, tokenizer, preprocess)
    folder = Path(arguments.output_dir)  # type: ignore[arg-type]
    skipped = skipped_images(arguments)

    split, places = None, []
    if stream is None:
        source = open_sources(arguments.data) if source is None else source
        split = split_by_blocks(source, arguments.holdout())
        places = describe_rows(source.columns, source.coordinates, arguments.describe)  # type: ignore[arg-type]
        _refuse_unknown(places, source)
    training, evaluation = training_data(arguments, preprocess, skipped, source=source, split=split, stream=stream)
    names = _country_names(places) if countries is None else sorted({in_country(country) for country in countries})
    writer = CaptionWriter(places, arguments.mixture, arguments.seed)
    length = text_config.max_position_embeddings
    collator = CaptionCollator(tokenizer, length, writer, names, arguments.describe)
    opening = MIXTURES[arguments.mixture].opening
    clock = CurveClock(arguments.max_seconds)
    trainer = StreetCLIPTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=training,
        eval_dataset=evaluation,
        compute_metrics=country_accuracy,
        callbacks=[clock],
        prompts=token_table(tokenizer, [f"{opening} in {name}." for name in names], length) if names else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if evaluation is not None else {}
    log = training_log(
        arguments,
        model,
        trainer.state,
        clock,
        split,
        skipped,
        countries=names,
        metrics={name: value for name, value in metrics.items() if name.endswith(("loss", "accuracy"))},
    )
    if trainer.is_world_process_zero():
        about = (
            "A CLIP trained on images and captions of their places by `geobased train streetclip`, from"
            f" {arguments.model or 'random weights'}."
        )
        final = trainer.accelerator.unwrap_model(trainer.model)
        task = "zero-shot-image-classification"
        card = model_card(title=folder.name, about=about, task=task, config=final.config.to_dict(), log=log)
        save_model_folder(final, [tokenizer, image_processor], folder / FINAL_FOLDER, arguments.save_dtype, card)
        write_json(folder / LOG_FILE, log)
        plot_curve(trainer.state.log_history, folder / PLOT_FILE)
    return log


def _check(arguments: StreetCLIPArguments, source: GeolocationSource | None, stream: RecordStream | None) -> None:
    check_run_arguments(arguments, ["output_dir"])
    if sum((bool(arguments.data), source is not None, stream is not None)) != 1:
        raise ValueError("give the images once: by --data, or as a source or a stream")
    if arguments.mixture not in MIXTURES:
        raise ValueError(f"mixture={arguments.mixture!r} is unknown; choose from {', '.join(MIXTURES)}")
    if arguments.chunk_size < 0:
        raise ValueError(f"chunk_size={arguments.chunk_size} must be at least 1, or 0 for no gradient cache")


def _check_sizes(model: StreetCLIPModel, tokenizer: PreTrainedTokenizerBase, preprocess: GpuImagePreprocessor) -> CLIPTextConfig:
    text, vision = model.config.text_config, model.config.vision_config
    assert isinstance(text, CLIPTextConfig) and isinstance(vision, CLIPVisionConfig)
    size, vocabulary = vision.image_size, text.vocab_size
    if (preprocess.crop_height, preprocess.crop_width) != (size, size):
        raise ValueError(
            f"the image processor makes {preprocess.crop_height} x {preprocess.crop_width} pixels but the model reads"
            f" {size} x {size}: give the --processor that belongs to it"
        )
    if len(tokenizer) > vocabulary:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids but the model vocab_size={vocabulary}")
    return text


def _refuse_unknown(places: Sequence[PlaceDescription | None], source: GeolocationSource) -> None:
    unknown = [row for row, place in enumerate(places) if place is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} images have no country, {source.name(unknown[0])} first: add a column country, or let"
            " --describe gazetteer name the nearest town"
        )


def _country_names(places: Sequence[PlaceDescription | None]) -> list[str]:
    if places:
        return sorted({in_country(place.country) for place in places if place is not None})
    from geobased.geography.gazetteer import countries

    return sorted({country.name_in_sentence for country in countries(streetclip=True)})


def _number(text: str) -> int:
    """A number of 63 bits that stands for a text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


__all__ = ["CaptionCollator", "StreetCLIPArguments", "StreetCLIPTrainer", "country_accuracy", "load_model", "train"]
