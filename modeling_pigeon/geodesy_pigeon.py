# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Coordinates and distances on tensors, for the model alone: it carries all its code with it when it is saved."""

import torch

# the equatorial radius of WGS 84, which PIGEON's published numbers use
EARTH_RADIUS_KM = 6378.137
# ten-millionths of a degree (a centimetre) as int32: no change of the model's dtype rounds a place, as bfloat16 would by 60 km
E7 = 10_000_000
UNSET = torch.iinfo(torch.int32).max


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_e7(coordinates: torch.Tensor) -> torch.Tensor:
    """Degrees -> int32 ten-millionths of a degree."""
    return (coordinates.detach().double().cpu() * E7).round().to(torch.int32)


def from_e7(coordinates: torch.Tensor) -> torch.Tensor:
    """int32 ten-millionths of a degree -> degrees, in the device's most precise dtype."""
    return coordinates.to(precise_dtype(coordinates.device)) / E7


def haversine_km(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Great-circle distances in km of places [..., 2], (latitude, longitude) in degrees; leading dimensions broadcast."""
    a, b = torch.deg2rad(a), torch.deg2rad(b)
    latitudes, longitudes = (a[..., 0] - b[..., 0]) / 2, (a[..., 1] - b[..., 1]) / 2
    across = torch.cos(a[..., 0]) * torch.cos(b[..., 0]) * torch.sin(longitudes).square()
    chord = (torch.sin(latitudes).square() + across).clamp(0, 1)  # rounding takes antipodes past 1
    return 2 * EARTH_RADIUS_KM * torch.asin(chord.sqrt())


def unit_vectors(coordinates: torch.Tensor) -> torch.Tensor:
    """Places [..., 2] in degrees -> [..., 3]: x to latitude 0, longitude 0; z to the north pole."""
    latitude, longitude = torch.deg2rad(coordinates).unbind(-1)
    return torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)


def vector_coordinates(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., 3] of any length -> the places [..., 2] in degrees that they point to."""
    x, y, z = vectors.unbind(-1)
    return torch.rad2deg(torch.stack([torch.atan2(z, torch.hypot(x, y)), torch.atan2(y, x)], dim=-1))


def spherical_mean(coordinates: torch.Tensor) -> torch.Tensor:
    """The place [2] nearest to the middle of places [n, 2], right across the date line and at poles, unlike a mean of degrees."""
    return vector_coordinates(unit_vectors(coordinates.double()).mean(0))


def check_coordinates(coordinates: torch.Tensor, name: str = "coordinates") -> None:
    """Raises `ValueError` unless `coordinates` is [n, 2]: finite latitudes in [-90, 90], longitudes in [-180, 180].

    The message names the first bad row. Swapped columns are noticed only where a longitude is no latitude.
    """
    if coordinates.dim() != 2 or coordinates.shape[1] != 2:
        raise ValueError(f"{name} must be [n, 2], (latitude, longitude) in degrees, not of shape {tuple(coordinates.shape)}")
    limits = torch.tensor([90.0, 180.0], dtype=coordinates.dtype, device=coordinates.device)
    bad = ~(coordinates.abs() <= limits)  # so that NaN is bad too
    if not bool(bad.any()):
        return
    row = int(bad.any(1).nonzero()[0])
    latitude, longitude = coordinates[row].tolist()
    finite = coordinates[torch.isfinite(coordinates).all(1)]
    swapped = finite.numel() and not bool((finite.flip(1).abs() > limits).any()) and abs(latitude) > 90
    hint = "; latitude and longitude seem to be swapped: the latitude comes first" if swapped else ""
    raise ValueError(
        f"{name}[{row}] is (latitude {latitude:g}, longitude {longitude:g}), which is no place: latitudes go from -90 to 90,"
        f" longitudes from -180 to 180{hint}"
    )


__all__ = [
    "EARTH_RADIUS_KM",
    "check_coordinates",
    "from_e7",
    "haversine_km",
    "spherical_mean",
    "to_e7",
    "unit_vectors",
    "vector_coordinates",
]
