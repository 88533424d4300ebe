"""The compact file of geocells: integers on a grid of degrees, as differences of variable length. numpy and shapely read it.

    8 bytes    b"GEOCELL1"
    4 bytes    length of the header, little-endian
    header     JSON: decimals, number of values and bytes of every section, texts, metadata, SHA-256 of the sections
    sections   one after the other; each a list of integers, zigzag-coded, seven bits a byte, lowest first

No general compressor is involved, so that equal cells give equal bytes on every machine.
"""

import hashlib
import json
from typing import Any

import numpy as np

MAGIC = b"GEOCELL1"


def encode_integers(values: np.ndarray) -> bytes:
    """Integers of either sign as zigzag varints: -1, 0 and 1 take a byte, as does everything from -64 to 63."""
    signed = np.asarray(values, dtype=np.int64)
    left = ((signed << 1) ^ (signed >> 63)).astype(np.uint64)
    columns = []
    while True:
        more = left > 127
        columns.append(((left & np.uint64(127)) | (more.astype(np.uint64) << np.uint64(7))).astype(np.uint8))
        left = left >> np.uint64(7)
        if not more.any():
            break
    table = np.stack(columns, axis=1)
    # a byte counts if every byte before it in its row announced another
    used = np.concatenate([np.ones((len(signed), 1), bool), np.cumprod(table[:, :-1] > 127, axis=1, dtype=np.int64) > 0], axis=1)
    return table[used].tobytes()


def decode_integers(data: bytes, count: int) -> np.ndarray:
    """The `count` integers of `encode_integers`.

    Raises:
        ValueError: the bytes hold another number of integers.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    last = octets < 128
    if int(last.sum()) != count or (len(octets) and not last[-1]):
        raise ValueError(f"a section holds {int(last.sum())} integers instead of {count}: the file is damaged")
    if not count:
        return np.zeros(0, dtype=np.int64)
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    shifts = (np.arange(len(octets)) - np.repeat(starts, np.diff(np.append(starts, len(octets))))).astype(np.uint64) * np.uint64(
        7
    )
    values = np.add.reduceat((octets & 127).astype(np.uint64) << shifts, starts)
    return (values >> np.uint64(1)).astype(np.int64) ^ -(values & np.uint64(1)).astype(np.int64)


def encode_polygons(polygons: np.ndarray, decimals: int) -> dict[str, np.ndarray]:
    """Polygons and multipolygons as integers: parts per polygon, rings per part, vertices per ring, differences x and y."""
    import shapely

    parts, polygon_of = shapely.get_parts(polygons, return_index=True)
    rings, part_of = shapely.get_rings(parts, return_index=True)
    xy, ring_of = shapely.get_coordinates(rings, return_index=True)
    # a ring's last vertex repeats its first
    open_ = np.concatenate([ring_of[1:] == ring_of[:-1], [False]])
    grid = np.rint(xy[open_] * 10.0**decimals).astype(np.int64)
    return {
        "parts": np.bincount(polygon_of, minlength=len(polygons)),
        "rings": np.bincount(part_of, minlength=len(parts)),
        "vertices": np.bincount(ring_of[open_], minlength=len(rings)),
        "x": np.diff(grid[:, 0], prepend=0),
        "y": np.diff(grid[:, 1], prepend=0),
    }


def decode_polygons(sections: dict[str, np.ndarray], decimals: int) -> np.ndarray:
    """Object array of the polygons and multipolygons of `encode_polygons`."""
    import shapely

    xy = np.stack([np.cumsum(sections["x"]), np.cumsum(sections["y"])], axis=1) / 10.0**decimals + 0.0
    counts = sections["vertices"]
    ring_of = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    closed = np.concatenate([xy, xy[starts]])
    order = np.argsort(np.concatenate([ring_of, np.arange(len(counts))]), kind="stable")
    rings = shapely.linearrings(closed[order], indices=np.repeat(np.arange(len(counts)), counts + 1))
    parts = shapely.polygons(rings, indices=np.repeat(np.arange(len(sections["rings"])), sections["rings"]))
    per_polygon = sections["parts"]
    multi = shapely.multipolygons(parts, indices=np.repeat(np.arange(len(per_polygon)), per_polygon))
    single = per_polygon == 1
    multi[single] = parts[(np.cumsum(per_polygon) - per_polygon)[single]]
    return multi


def pack(sections: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    """The file's bytes."""
    encoded = {name: encode_integers(values) for name, values in sections.items()}
    body = b"".join(encoded.values())
    table = [[name, len(sections[name]), len(data)] for name, data in encoded.items()]
    described = {**header, "sections": table, "sha256": hashlib.sha256(body).hexdigest()}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")
    return MAGIC + len(text).to_bytes(4, "little") + text + body


def unpack(data: bytes, name: str = "the file") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Sections and header of a file's bytes.

    Raises:
        ValueError: no file of geocells, or a damaged one.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{name} is no file of geocells (it does not start with {MAGIC.decode()})")
    start = len(MAGIC) + 4
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    if len(data) < end:
        raise ValueError(f"{name} is damaged: it ends inside its header")
    try:
        header = json.loads(data[start:end].decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is damaged: its header is no JSON ({error})") from error
    body = data[end:]
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise ValueError(f"{name} is damaged: its content does not have the checksum that its header names")
    sections, position = {}, 0
    for section, count, length in header["sections"]:
        sections[section] = decode_integers(body[position : position + length], count)
        position += length
    return sections, header


__all__ = ["MAGIC", "decode_integers", "decode_polygons", "encode_integers", "encode_polygons", "pack", "unpack"]
