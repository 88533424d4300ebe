"""Images with places: a folder with a table, tar shards as WebDataset has them, or a data set of the `datasets` library.

A source knows coordinates and columns of every image at once, and reads an image when it is asked for: data of any size stream
from the disk, and a row's number is all that a resumed run needs. What can only be read from front to end (a streaming data set)
is a `RecordStream`.
"""

import csv
import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from geobased.geography.coordinates import check_coordinates
from geobased.modeling_streetclip.image_decoding import ImageSource

# names of columns and fields, in any case
LATITUDE_NAMES, LONGITUDE_NAMES = ("latitude", "lat"), ("longitude", "lng", "lon", "long")
PATH_NAMES = ("path", "image", "file_name", "filename", "file", "img_path")
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2"})
Value = str | float | int | None


@dataclass
class Record:
    """One image that is not decoded yet.

    Attributes:
        name: what reports call it.
        image: a path, the bytes of a file or a PIL image.
        latitude, longitude: degrees.
        columns: everything else that is known, by name.
    """

    name: str
    image: ImageSource
    latitude: float
    longitude: float
    columns: dict[str, Value] = field(default_factory=dict)


class GeolocationSource(Protocol):
    """Images of which each can be read by its number.

    Attributes:
        coordinates: float64 [n, 2], (latitude, longitude) in degrees.
        columns: name: list of n values, None where there is none.
    """

    coordinates: np.ndarray
    columns: dict[str, list[Value]]

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What reports call the image."""
        ...

    def image(self, row: int) -> ImageSource:
        """The image, not decoded."""
        ...


class ImageFolder:
    """A csv file of image paths (relative to its folder, or to `root`) with columns path, latitude and longitude, and any others.

    Common other names of the three are understood (`lat`, `lng`, `file_name`, …). "NA" stays text: it is Namibia's code.

    Raises:
        ValueError: no such file, a column missing, no rows, coordinates that are none; the message names file and row.
    """

    def __init__(self, table: str | Path, root: str | Path | None = None) -> None:
        table = Path(table)
        if not table.is_file():
            raise ValueError(f"there is no table {table}: give a csv file with columns path, latitude, longitude")
        self.root = table.parent if root is None else Path(root)
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            path, latitude, longitude = _columns(names, str(table))
            rows = list(reader)
        if not rows:
            raise ValueError(f"{table} has no rows")
        self.coordinates = _places([(row[latitude], row[longitude]) for row in rows], str(table))
        self.columns = {n: [row[n] or None for row in rows] for n in names if n not in (path, latitude, longitude)}
        self._paths = [row[path] for row in rows]

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        return self._paths[row]

    def image(self, row: int) -> ImageSource:
        return self.root / self._paths[row]


class TarShards:
    """Uncompressed tar files in WebDataset's layout: members of one sample share the name before the first dot of the file name.

    A sample is an image (`.jpg`, `.png`, …) with a `.json` that has latitude, longitude and any other fields. The headers of the
    shards are read once; an image is then read at its place in the file. Samples lacking either part are left out and reported in
    `incomplete`.

    Raises:
        ValueError: no shard, one that is damaged or compressed, or no complete sample in any.
    """

    def __init__(self, shards: Sequence[str | Path], progress: bool = True) -> None:
        if not shards:
            raise ValueError("no tar shards were given")
        self.incomplete: list[str] = []
        self._shards = [Path(shard) for shard in shards]
        self._members: list[tuple[int, str, int, int]] = []
        places, fields = [], []
        for number, shard in enumerate(tqdm(self._shards, desc="indexing shards", unit="shard", disable=not progress)):
            for key, (member, facts) in self._read_shard(shard).items():
                if member is None or facts is None:
                    self.incomplete.append(f"{shard.name}/{key}: no {'image' if member is None else 'json'}")
                    continue
                _, latitude, longitude = _columns([*facts, "path"], f"{shard}/{key}.json")
                places.append((facts.pop(latitude), facts.pop(longitude)))
                fields.append(facts)
                self._members.append((number, *member))
        if not places:
            raise ValueError(f"{len(self._shards)} shards, {self._shards[0]} first, hold no image with a json of its place")
        self.coordinates = _places(places, "the shards")
        names = dict.fromkeys(name for facts in fields for name in facts)
        self.columns = {name: [_plain(facts.get(name)) for facts in fields] for name in names}

    @staticmethod
    def _read_shard(shard: Path) -> dict[str, list[Any]]:
        samples: dict[str, list[Any]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, [None, None])
                    if suffix.lower() in IMAGE_SUFFIXES:
                        sample[0] = (member.name, member.offset_data, member.size)
                    elif suffix.lower() == "json":
                        content = archive.extractfile(member)
                        sample[1] = json.loads(content.read()) if content is not None else None
        except FileNotFoundError as error:
            raise ValueError(f"there is no shard {shard}") from error
        except (tarfile.TarError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{shard} cannot be read as an uncompressed tar file of images and json: {error}") from error
        return samples

    def __len__(self) -> int:
        return len(self._members)

    def name(self, row: int) -> str:
        shard, name, _, _ = self._members[row]
        return f"{self._shards[shard].name}/{name}"

    def image(self, row: int) -> ImageSource:
        shard, _, offset, size = self._members[row]
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)


class HubDataset:
    """A `datasets.Dataset` with columns image, latitude and longitude, and any others. Images stay encoded until they are read.

    Raises:
        ValueError: a column missing, no rows, coordinates that are none.
    """

    def __init__(self, dataset: Any) -> None:
        self._image, latitude, longitude = _columns(dataset.column_names, "the data set")
        if not len(dataset):
            raise ValueError("the data set has no rows")
        self.coordinates = _places(zip(dataset[latitude], dataset[longitude], strict=True), "the data set")
        others = [name for name in dataset.column_names if name not in (self._image, latitude, longitude)]
        self.columns = {name: [_plain(value) for value in dataset[name]] for name in others}
        self._images = _undecoded(dataset, self._image).select_columns([self._image])

    def __len__(self) -> int:
        return len(self._images)

    def name(self, row: int) -> str:
        return f"row {row}"

    def image(self, row: int) -> ImageSource:
        return _image_of(self._images[row][self._image])


class RecordStream:
    """A `datasets.IterableDataset` (or any iterable of such rows, which can be started again) as a stream of records.

    Raises:
        ValueError: while iterating, for a row that lacks a column or whose coordinates are none.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Record]:
        rows = self._rows
        features = getattr(rows, "features", None)
        if features and (names := [name for name in features if name.lower() in PATH_NAMES]):
            rows = _undecoded(rows, names[0])
        for number, row in enumerate(rows):
            image, latitude, longitude = _columns(list(row), f"row {number} of the stream")
            lat, lng = _places([(row[latitude], row[longitude])], f"row {number} of the stream")[0].tolist()
            others = {name: _plain(value) for name, value in row.items() if name not in (image, latitude, longitude)}
            yield Record(f"row {number}", _image_of(row[image]), lat, lng, others)


class JoinedSources:
    """Several sources as one, in their order; a column that one of them lacks is None there."""

    def __init__(self, sources: Sequence[GeolocationSource]) -> None:
        if not sources:
            raise ValueError("there are no sources to join")
        self._sources = sources
        self._starts = np.cumsum([0, *(len(source) for source in sources)])
        self.coordinates = np.concatenate([source.coordinates for source in sources])
        names = dict.fromkeys(name for source in sources for name in source.columns)
        self.columns = {
            name: [value for source in sources for value in source.columns.get(name, [None] * len(source))] for name in names
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[GeolocationSource, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._sources[number], row - int(self._starts[number])

    def name(self, row: int) -> str:
        source, row = self._find(row)
        return source.name(row)

    def image(self, row: int) -> ImageSource:
        source, row = self._find(row)
        return source.image(row)


def open_sources(data: Sequence[str | Path], progress: bool = True) -> GeolocationSource:
    """The source that paths stand for, joined if they are several.

    A `.csv` is a table of an `ImageFolder`; `.tar` files are shards, all of them together one `TarShards`; a folder holds either
    a data set saved by `datasets`, or shards, or one csv file.

    Raises:
        ValueError: a path that is none of these, and whatever the sources raise.
    """
    if not data:
        raise ValueError("no data: give csv files, tar shards, or folders of them (--data)")
    sources: list[GeolocationSource] = []
    shards: list[Path] = []
    for path in map(Path, data):
        tables = sorted(path.glob("*.csv")) if path.is_dir() else []
        found = sorted(path.glob("*.tar")) if path.is_dir() else []
        if path.suffix == ".csv":
            sources.append(ImageFolder(path))
        elif path.suffix == ".tar":
            shards.append(path)
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            sources.append(HubDataset(_load_from_disk(path)))
        elif found and not tables:
            shards += found
        elif len(tables) == 1 and not found:
            sources.append(ImageFolder(tables[0]))
        else:
            what = f"it holds {len(tables)} csv and {len(found)} tar files" if path.is_dir() else "there is no such folder"
            raise ValueError(
                f"{path} is no csv file, tar shard or folder with one csv file, with shards or of `datasets`: {what}"
            )
    if shards:
        sources.append(TarShards(shards, progress))
    return sources[0] if len(sources) == 1 else JoinedSources(sources)


def _load_from_disk(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        raise ValueError(f"{path} holds the splits {', '.join(dataset)}: give the folder of one of them")
    return dataset


def _columns(names: Iterable[str], what: str) -> tuple[str, str, str]:
    """Names of the columns of image, latitude and longitude."""
    by_name = {name.lower().strip(): name for name in names}
    found = []
    for wanted in (PATH_NAMES, LATITUDE_NAMES, LONGITUDE_NAMES):
        name = next((by_name[name] for name in wanted if name in by_name), None)
        if name is None:
            raise ValueError(
                f"{what} has no column {wanted[0]!r} (or {', '.join(wanted[1:])}); it has: {', '.join(by_name.values())}"
            )
        found.append(name)
    return found[0], found[1], found[2]


def _places(pairs: Iterable[tuple[Any, Any]], what: str) -> np.ndarray:
    values = np.array([[_number(a), _number(b)] for a, b in pairs], dtype=np.float64).reshape(-1, 2)
    check_coordinates(values[:, 0], values[:, 1], name=f"places in {what}")
    return values


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan  # refused with its row by the check of coordinates


def _plain(value: Any) -> Value:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return None
    return value if isinstance(value, str | float | int) else json.dumps(value, ensure_ascii=False)


def _undecoded(dataset: Any, column: str) -> Any:
    """The data set with the image column left as bytes or a path, where it is an image column."""
    features = dataset.features
    if features is None or type(features[column]).__name__ != "Image":
        return dataset
    from datasets import Image

    return dataset.cast_column(column, Image(decode=False))


def _image_of(value: Any) -> ImageSource:
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") is not None else value["path"]
    return value


__all__ = [
    "GeolocationSource",
    "HubDataset",
    "ImageFolder",
    "JoinedSources",
    "Record",
    "RecordStream",
    "TarShards",
    "open_sources",
]
