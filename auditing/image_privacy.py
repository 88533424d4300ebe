"""Privacy of geolocalizers: whether metadata leaks into answers, and whether losses tell which images a model was trained on.

How strong a change of pixels must be to hide a place is the technique `cloak`.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from geobased.geography.coordinates import haversine_km

from .access import Capability
from .image_tries import ImageTries
from .questions import AuditQuestion, Item
from .technique import Progress, Technique

GPS_BLOCK = 0x8825
# where EXIF lies: far apart, so that one of them is far from any photo
LIES = ((-41.2866, 174.7756), (64.1466, -21.9426))
MAKER, TAKEN = "geobased audit", "2001:02:03 04:05:06"
DIGITS = 3
LEAST_RATES = (0.01, 0.05)


def gps_exif(latitude: float, longitude: float) -> Image.Exif:
    """EXIF with a place (degrees), a time and a maker, as cameras write it."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0132] = MAKER, TAKEN
    gps = exif.get_ifd(GPS_BLOCK)
    gps[1], gps[2] = "S" if latitude < 0 else "N", _sexagesimal(latitude)
    gps[3], gps[4] = "W" if longitude < 0 else "E", _sexagesimal(longitude)
    return exif


def _sexagesimal(degrees: float) -> tuple[float, float, float]:
    whole, rest = divmod(abs(degrees), 1)
    minutes, rest = divmod(60 * rest, 1)
    return float(whole), float(minutes), round(60 * rest, 4)


@dataclass(frozen=True)
class ExifFinding:
    """Answers to one picture with other metadata.

    Attributes:
        name: of the picture.
        answers: to files without EXIF, and with the EXIF of each of `LIES`, by what the file had.
        same: whether all answers are equal.
        leaks: words of the EXIF (coordinates to three digits, time, maker) that an answer contains.
    """

    name: str
    answers: dict[str, Any]
    same: bool
    leaks: list[str]


def exif_proof(locate: Callable[[Path], Any], pictures: Sequence[tuple[str, Image.Image]]) -> list[ExifFinding]:
    """Asks for the answer to files with the same pixels and other EXIF. An answer must neither change nor repeat it.

    Args:
        locate: answers to the path of a file: a pipeline, or a function that calls a target or a program. What it returns is
            compared as JSON, so that all that a user would see is.
        pictures: names and images, whose own metadata are left out.
    """
    found = []
    for name, picture in pictures:
        answers = {what: locate(path) for what, path in _files(picture)}
        texts = [json.dumps(answer, sort_keys=True, default=str) for answer in answers.values()]
        leaks = sorted({word for text in texts[1:] for word in exif_words() if word in text and word not in texts[0]})
        found.append(ExifFinding(name, answers, len(set(texts)) == 1, leaks))
    return found


def exif_words() -> list[str]:
    """What must not appear in any output about files that bear EXIF of `LIES`."""
    sizes = [abs(value) for place in LIES for value in place]
    # rounded, or cut off after as many digits
    numbers = {text for size in sizes for text in (f"{size:.{DIGITS}f}", f"{math.floor(size * 10**DIGITS) / 10**DIGITS}")}
    return [MAKER, TAKEN, *sorted(numbers)]


def _files(picture: Image.Image) -> Iterator[tuple[str, Path]]:
    """The picture as files, one after the other, by what EXIF they have."""
    pixels = Image.fromarray(np.array(picture.convert("RGB")))
    with tempfile.TemporaryDirectory() as folder:
        # no name that tells the files apart
        path = Path(folder) / "picture.png"
        pixels.save(path)
        yield "no EXIF", path
        for latitude, longitude in LIES:
            pixels.save(path, exif=gps_exif(latitude, longitude))
            yield f"EXIF of {latitude:g}, {longitude:g}", path


@dataclass(frozen=True)
class LyingExif(Technique):
    """Gives the same pixels in files whose EXIF names other places: no answer may follow it."""

    name: ClassVar[str] = "lying_exif"
    kind: ClassVar[str] = "image"
    needs: ClassVar[Capability] = Capability.QUERY

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        with ImageTries(target, question, item, progress) as tries:
            for what, path in _files(question.picture(item)):
                tries.tried(target.prepare([path]), [0.0], what, candidates=[what])


def place_losses(target: Any, images: torch.Tensor, truths: np.ndarray, *, at_once: int = 32) -> np.ndarray:
    """Loss (nats) of the candidate nearest to each true place; images [n, 3, height, width], truths [n, 2] degrees. LOGITS."""
    candidate_lat, candidate_lng = target.candidates()["coordinates"].numpy().T
    losses = []
    for start in range(0, len(images), at_once):
        with torch.no_grad():
            logs = target.forward(images[start : start + at_once]).logits
        for row, (latitude, longitude) in zip(logs, truths[start : start + at_once], strict=True):
            losses.append(-float(row[int(np.argmin(haversine_km(candidate_lat, candidate_lng, latitude, longitude)))]))
    return np.array(losses)


@dataclass(frozen=True)
class MembershipResult:
    """How well a score tells members of the training set from others.

    Attributes:
        area: under the curve of true against false positives: 0.5 is chance.
        low, high: its bootstrap interval.
        rates: share of members that are told at a share of others that are wrongly taken for members, by the latter.
        members, others: how many.
    """

    area: float
    low: float
    high: float
    rates: dict[float, float]
    members: int
    others: int


def membership(
    member_losses: Sequence[float] | np.ndarray,
    other_losses: Sequence[float] | np.ndarray,
    *,
    resamples: int = 1000,
    coverage: float = 0.95,
    seed: int = 0,
) -> MembershipResult:
    """Membership inference by loss (Yeom et al. 2018): what has the lower loss is taken for a member.

    It shows a leak only as far as members and others are alike but for their part in the training: others should be drawn as
    members were. Rates at few false positives say more about single images than the area does (Carlini et al. 2022).

    Raises:
        ValueError: fewer than two members or others, or losses that are not finite.
    """
    members, others = np.asarray(member_losses, dtype=np.float64), np.asarray(other_losses, dtype=np.float64)
    if min(len(members), len(others)) < 2 or not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise ValueError("membership needs finite losses of at least two members and two others")
    generator = np.random.default_rng(seed)
    drawn = [_area(generator.choice(members, len(members)), generator.choice(others, len(others))) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - coverage) / 2, (1 + coverage) / 2])
    # the largest threshold below which no more than that share of the others lies
    ordered = np.sort(others)
    rates = {rate: float((members < ordered[int(rate * len(ordered))]).mean()) for rate in LEAST_RATES}
    return MembershipResult(_area(members, others), float(low), float(high), rates, len(members), len(others))


def _area(members: np.ndarray, others: np.ndarray) -> float:
    """Chance that a member has a lower loss than another image; equal losses count half."""
    ordered = np.sort(others)
    above = len(ordered) - np.searchsorted(ordered, members, side="right")
    equal = np.searchsorted(ordered, members, side="right") - np.searchsorted(ordered, members, side="left")
    return float((above + equal / 2).mean() / len(ordered))


__all__ = [
    "LIES",
    "ExifFinding",
    "LyingExif",
    "MembershipResult",
    "exif_proof",
    "exif_words",
    "gps_exif",
    "membership",
    "place_losses",
]
