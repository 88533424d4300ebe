"""What PIGEON's heads learn, from places and columns: the geocell, and the labels of the auxiliary heads."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geobased.geography.geocell_collection import Geocells
from geobased.modeling_pigeon.configuration_pigeon import checked_head

UNKNOWN_CLASS = -100


def load_geocells(geocells: str | Path) -> Geocells:
    """The cells that ship with the package ("world"), or those of a file. Raises `ValueError` for no or a damaged file."""
    return Geocells.world() if str(geocells) == "world" else Geocells.load(geocells)


def load_heads(text: str | None) -> list[dict[str, Any]]:
    """Auxiliary heads as `PigeonConfig` takes them, from a JSON file or string; none for None.

    Raises:
        ValueError: no such file, text that is no JSON list, or a head that is none.
    """
    if text is None:
        return []
    if not text.lstrip().startswith("["):
        if not Path(text).is_file():
            raise ValueError(f"heads={text!r} is neither a JSON list nor a file that exists")
        text = Path(text).read_text(encoding="utf-8")
    try:
        heads = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the heads are no JSON: {error}") from error
    if not isinstance(heads, list) or not all(isinstance(head, dict) for head in heads):
        raise ValueError("the heads must be a JSON list of objects with name, kind and size")
    return [checked_head(head) for head in heads]


def head_labels(columns: Mapping[str, Sequence[Any]], heads: Sequence[Mapping[str, Any]], count: int) -> dict[str, torch.Tensor]:
    """Labels of auxiliary heads from columns.

    A regression takes a column for each of its `labels` (the head's name where it has one value and no labels): numbers, NaN
    where empty. A classification takes the column of its name: one of its `labels`, or a class from 0 on if it has none; -100
    where empty.

    Args:
        columns: name: [n] values.
        heads: as in `PigeonConfig`.
        count: n.

    Returns:
        name of the head: float32 [n, size] of a regression, int64 [n] of a classification.

    Raises:
        ValueError: a head none of whose columns is there, and values that are neither numbers nor classes.
    """
    found: dict[str, torch.Tensor] = {}
    for head in heads:
        name, size, labels = head["name"], head["size"], head.get("labels")
        names = [name] if head["kind"] == "classification" else list(labels or ([name] if size == 1 else []))
        there = [column for column in names if column in columns]
        if not there:
            wanted = ", ".join(names) or "labels that name columns"
            raise ValueError(f"head {name!r} finds nothing to learn: it needs columns {wanted}; there are {', '.join(columns)}")
        if head["kind"] == "classification":
            classes = {str(label): number for number, label in enumerate(labels or [])}
            found[name] = torch.tensor([_class(value, classes, head) for value in columns[name]], dtype=torch.int64)
        else:
            values = np.full((count, size), np.nan, np.float32)
            for place, column in enumerate(names):
                if column in columns:
                    values[:, place] = [_number(value, column) for value in columns[column]]
            found[name] = torch.from_numpy(values)
    return found


def standardise_heads(
    heads: Sequence[Mapping[str, Any]], labels: Mapping[str, torch.Tensor], rows: np.ndarray
) -> list[dict[str, Any]]:
    """Heads with means and standard deviations of their (logarithmic) values over the training rows, where they had none.

    Raises:
        ValueError: a value whose logarithm does not exist.
    """
    fitted = []
    for head in heads:
        if head["kind"] != "regression" or head.get("means") is not None or head.get("stds") is not None:
            fitted.append(dict(head))
            continue
        values = labels[head["name"]][torch.from_numpy(rows)].double().numpy()
        for place, offset in enumerate(head.get("log_offsets") or []):
            if offset is not None:
                if (values[:, place] + offset <= 0).any():
                    raise ValueError(
                        f"head {head['name']!r} holds {np.nanmin(values[:, place]):g}, whose logarithm with offset {offset:g}"
                        " does not exist: give a larger log_offsets"
                    )
                values[:, place] = np.log(values[:, place] + offset)
        known = ~np.isnan(values)
        counts = np.maximum(known.sum(0), 1)
        means = np.where(known, values, 0).sum(0) / counts
        stds = np.sqrt((np.where(known, values - means, 0) ** 2).sum(0) / counts)
        # a constant is learned as it is
        stds[stds < 1e-12] = 1.0
        fitted.append({**head, "means": means.tolist(), "stds": stds.tolist()})
    return fitted


def _number(value: Any, column: str) -> float:
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {column!r} holds {value!r}, which is no number") from error


def _class(value: Any, classes: Mapping[str, int], head: Mapping[str, Any]) -> int:
    if value is None or value == "":
        return UNKNOWN_CLASS
    number = classes.get(str(value))
    if number is None and not classes:
        try:
            number = int(float(value))
        except (TypeError, ValueError):
            number = None
    if number is None or not 0 <= number < head["size"]:
        known = ", ".join(classes) if classes else f"0 to {head['size'] - 1}"
        raise ValueError(f"column {head['name']!r} holds {value!r}, which is none of the classes: {known}")
    return number


__all__ = ["head_labels", "load_geocells", "load_heads", "standardise_heads"]
