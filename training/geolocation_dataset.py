"""Decoded images of one side of the hold-out, in an order that seed and number alone determine; unreadable ones are replaced.

Training numbers its rows from the first of the first epoch to the last of the last. Each number names an epoch and a place in
that epoch's order, so a resumed run reads what the uninterrupted one would have read, without reading it all again.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from geobased.modeling_streetclip.image_decoding import UnreadableImageError, decode_image
from geobased.training.geolocation_sources import GeolocationSource, RecordStream
from geobased.training.geolocation_splits import BlockHoldout

Preprocessor = Callable[[list[torch.Tensor]], torch.Tensor]
REPORT_FILE = "skipped_images.jsonl"


@dataclass
class SkippedImages:
    """What could not be read, each image once: in memory and, line by line, in a file that workers share.

    Args:
        path: a JSON-lines file of {"name", "reason"}; none is written if None.
    """

    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if self.path is not None:
            line = json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n"
            # one write of a short line at the end of the file: lines of several processes do not mix
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode("utf-8"))
            finally:
                os.close(descriptor)

    def all(self) -> dict[str, str]:
        """name: reason, of all processes that wrote to the file."""
        if self.path is None or not self.path.is_file():
            return dict(self.reasons)
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return {line["name"]: line["reason"] for line in lines} | self.reasons


@dataclass(frozen=True)
class Split:
    """Rows of a source on both sides of the hold-out. No row is on both: a block belongs to one side.

    Attributes:
        training, evaluation: int64 row numbers.
        facts: how many images and blocks each side has, and the settings.
    """

    training: np.ndarray
    evaluation: np.ndarray
    facts: dict[str, Any]


def split_by_blocks(source: GeolocationSource, holdout: BlockHoldout) -> Split:
    """Both sides of a source.

    Raises:
        ValueError: nothing is left to train on, or nothing is held out although a fraction was asked for.
    """
    latitude, longitude = source.coordinates.T
    held, training = holdout.held_out(latitude, longitude), holdout.in_training(latitude, longitude)
    blocks = holdout.blocks(latitude, longitude)
    facts = {
        "degrees": holdout.degrees,
        "fraction": holdout.fraction,
        "seed": holdout.seed,
        "margin_km": holdout.margin_km,
        "training_images": int(training.sum()),
        "evaluation_images": int(held.sum()),
        "margin_images": int((~held & ~training).sum()),
        "training_blocks": len(np.unique(blocks[training])),
        "evaluation_blocks": len(np.unique(blocks[held])),
    }
    if not training.any() or (holdout.fraction > 0 and not held.any()):
        side = "hold out" if training.any() else "train on"
        raise ValueError(
            f"blocks of {holdout.degrees:g} degrees with fraction {holdout.fraction:g} and seed {holdout.seed} leave no image to"
            f" {side} ({len(source)} images in {len(np.unique(blocks))} blocks): choose smaller blocks, another fraction or seed"
        )
    return Split(np.flatnonzero(training), np.flatnonzero(held), facts)


class GeolocationRows(Dataset):
    """Rows of a source as {"row", "epoch", "latitude", "longitude", "pixel_values"}.

    Args:
        source: where images come from.
        rows: [n] the rows of the source that belong to this data set.
        preprocess: list of uint8 images -> pixel values [n, 3, height, width]; None gives rows without pixels.
        size: rows in all; n if None. Above n, epochs follow each other.
        seed: of the order of each epoch; None keeps the order of `rows`.
        skipped: told of images that cannot be read. Such a row gives the next readable one of the order instead, so a batch
            always has its size.

    Raises:
        ValueError: no rows; while reading, no readable image among `MAX_TRIES` in a row.
    """

    MAX_TRIES = 100

    def __init__(
        self,
        source: GeolocationSource,
        rows: np.ndarray,
        preprocess: Preprocessor | None,
        *,
        size: int | None = None,
        seed: int | None = None,
        skipped: SkippedImages | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError("there are no rows for the data set")
        self.source, self.rows, self.preprocess, self.seed = source, np.asarray(rows), preprocess, seed
        self.size = len(rows) if size is None else size
        self.skipped = SkippedImages() if skipped is None else skipped
        self._order: tuple[int, np.ndarray] = (-1, self.rows)

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> tuple[int, int]:
        """(epoch, row of the source) of one number."""
        epoch, place = divmod(index, len(self.rows))
        if self.seed is None:
            return epoch, int(self.rows[place])
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows))
        return epoch, int(self._order[1][place])

    def __getitem__(self, index: int) -> dict[str, Any]:
        for number in range(index, index + self.MAX_TRIES):
            # the last rows of a data set are followed by its first
            epoch, row = self.row(number if self.seed is not None else number % len(self.rows))
            latitude, longitude = self.source.coordinates[row]
            item: dict[str, Any] = {"row": row, "epoch": epoch, "latitude": latitude, "longitude": longitude}
            if self.preprocess is None:
                return item
            name = self.source.name(row)
            try:
                item["pixel_values"] = self.preprocess([decode_image(self.source.image(row))])[0]
                return item
            except UnreadableImageError as error:
                self.skipped.add(name, str(error))
        raise ValueError(f"{self.MAX_TRIES} images in a row cannot be read, {name} the last: {self.skipped.reasons[name]}")


class StreamedRows(IterableDataset):
    """Records of one side of a stream as `GeolocationRows` gives them, with their columns under "columns".

    Args:
        stream: what to read; it is started again for each epoch.
        holdout, held_out: which side to give.
        shuffle_buffer: records (not decoded) that wait in a buffer, out of which one is drawn at random; 0 keeps the order.
        seed: of the draws.
        epochs: how often the stream is read; None: without end.
        skipped: told of images that cannot be read, which are left out.

    Raises:
        ValueError: while reading, for an epoch without a readable image of this side.
    """

    def __init__(
        self,
        stream: RecordStream,
        preprocess: Preprocessor,
        holdout: BlockHoldout,
        *,
        held_out: bool,
        shuffle_buffer: int = 0,
        seed: int = 0,
        epochs: int | None = 1,
        skipped: SkippedImages | None = None,
    ) -> None:
        self.stream, self.preprocess, self.holdout, self.held_out = stream, preprocess, holdout, held_out
        self.shuffle_buffer, self.seed, self.epochs = shuffle_buffer, seed, epochs
        self.skipped = SkippedImages() if skipped is None else skipped

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        wanted = self.holdout.held_out if self.held_out else self.holdout.in_training
        for epoch in itertools.count() if self.epochs is None else range(self.epochs):
            given = 0
            generator = np.random.default_rng([self.seed, epoch])
            for place, record in enumerate(_shuffled(self.stream, self.shuffle_buffer, generator)):
                # every worker reads the whole stream and decodes its part
                if place % workers != number or not wanted([record.latitude], [record.longitude])[0]:
                    continue
                try:
                    pixels = self.preprocess([decode_image(record.image)])[0]
                except UnreadableImageError as error:
                    self.skipped.add(record.name, str(error))
                    continue
                given += 1
                yield {
                    "row": place,
                    "epoch": epoch,
                    "latitude": record.latitude,
                    "longitude": record.longitude,
                    "pixel_values": pixels,
                    "columns": record.columns,
                }
            if not given and self.epochs is None:
                raise ValueError(
                    f"the stream holds no readable image {'of the held-out blocks' if self.held_out else 'to train on'}"
                )


def _shuffled(records: RecordStream, size: int, generator: np.random.Generator) -> Iterator[Any]:
    buffer: list[Any] = []
    for record in records:
        if len(buffer) < size:
            buffer.append(record)
            continue
        if size:
            place = int(generator.integers(size))
            record, buffer[place] = buffer[place], record
        yield record
    yield from (buffer[place] for place in generator.permutation(len(buffer)))


def stack_places(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What every collator needs: coordinates float64 [batch, 2] and, if there are any, pixel_values [batch, 3, height, width]."""
    batch = {"coordinates": torch.tensor([[item["latitude"], item["longitude"]] for item in items], dtype=torch.float64)}
    if "pixel_values" in items[0]:
        batch["pixel_values"] = torch.stack([item["pixel_values"] for item in items])
    return batch


__all__ = [
    "REPORT_FILE",
    "GeolocationRows",
    "SkippedImages",
    "Split",
    "StreamedRows",
    "split_by_blocks",
    "stack_places",
]
