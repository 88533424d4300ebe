"""Square crops of an equirectangular picture of the Earth, as a camera far above the middle of the crop sees it.

A crop is the gnomonic projection around its centre: great circles are straight in it, and nothing is stretched near the poles,
as it is in the picture itself. Its edges are tangents of half the angle across: the middle column of a crop of 8 degrees spans 8
degrees.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from geobased.geography.coordinates import check_coordinates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# beyond, a gnomonic crop is mostly edge
MAX_DEGREES = 120.0
MAX_LEVELS = 4
ROWS_PER_BLOCK = 64
# what a core's cache holds: larger blocks take half as long again
PIXELS_PER_CPU_BLOCK = 64 * 64 * 64


def crop_rays(
    latitude: "ArrayLike",
    longitude: "ArrayLike",
    degrees: "ArrayLike",
    rotation: "ArrayLike",
    size: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Where the pixels of crops lie on the Earth.

    Args:
        latitude, longitude: [n] degrees, centres.
        degrees: [n] (or one for all) angle across the middle of the crop, above 0 and at most `MAX_DEGREES`.
        rotation: [n] (or one for all) compass direction of the crop's top in degrees: 0 north up, 90 east up.
        size: pixels along an edge.

    Returns:
        [n, size, size, 3] vectors to the middles of the pixels, not of length one: x to latitude 0, longitude 0; z to the north
        pole.

    Raises:
        ValueError: NaN, coordinates out of range or swapped, angles or sizes out of range, and lengths that do not fit.
    """
    return _rays(*_checked(latitude, longitude, degrees, rotation, size), size, device, dtype)


def crop_coordinates(
    latitude: "ArrayLike", longitude: "ArrayLike", degrees: "ArrayLike", rotation: "ArrayLike", size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(latitude, longitude) in degrees of every pixel's middle, float64 [n, size, size] each. As `crop_rays`."""
    rays = crop_rays(latitude, longitude, degrees, rotation, size, dtype=torch.float64)
    lat, lng = _angles(rays)
    return np.degrees(lat.numpy()), np.degrees(lng.numpy())


class EarthImage:
    """An equirectangular picture of the whole Earth, held once in memory, that crops are cut from in batches.

    The picture is kept at several resolutions, each half of the one before, and a crop reads the one whose pixels are about as
    large as its own. Rows near the poles, whose pixels are slivers, are averaged along the parallel to the width that their
    height has.

    Args:
        pixels: uint8 [height, width, 3]; row 0 touches the north pole, column 0 the dateline; twice as wide as high.
        device: where it is held and crops are made.

    Raises:
        ValueError: another type or shape.
    """

    def __init__(self, pixels: "ArrayLike | torch.Tensor", device: str | torch.device = "cpu") -> None:
        picture = torch.as_tensor(pixels)
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"pixels must be uint8 [height, width, 3], not {picture.dtype} {tuple(picture.shape)}")
        height, width, _ = picture.shape
        if height < 2 or width != 2 * height:
            raise ValueError(
                f"pixels of {width} x {height} are no equirectangular picture of the Earth: it is twice as wide as high"
            )
        self.height, self.device = height, torch.device(device)
        level = picture.to(self.device).permute(2, 0, 1).float() / 255
        self._levels = [_wrapped(_even_rows(level))]
        while len(self._levels) < MAX_LEVELS and not (level.shape[1] % 2 or level.shape[2] % 2) and level.shape[1] > 2:
            level = F.avg_pool2d(level[None], 2)[0]
            self._levels.append(_wrapped(_even_rows(level)))

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> "EarthImage":
        """Read an image file. Raises `ValueError` if there is none or it cannot be used."""
        from geobased.modeling_streetclip.image_decoding import decode_image

        if not Path(path).is_file():
            raise ValueError(f"there is no image {path}")
        return cls(decode_image(path).permute(1, 2, 0), device)

    def __getstate__(self) -> dict[str, Any]:
        # workers of a data loader would each hold a copy on the GPU
        if self.device.type != "cpu":
            raise ValueError(f"an EarthImage on {self.device} stays in its process: use num_workers=0, or device='cpu'")
        return self.__dict__

    def crops(
        self, latitude: "ArrayLike", longitude: "ArrayLike", degrees: "ArrayLike", rotation: "ArrayLike" = 0.0, *, size: int = 64
    ) -> torch.Tensor:
        """Crops around centres: float32 [n, 3, size, size] from 0 to 1, on the picture's device. Arguments as `crop_rays`."""
        checked = _checked(latitude, longitude, degrees, rotation, size)
        count = len(checked[0])
        step = max(1, PIXELS_PER_CPU_BLOCK // size**2) if self.device.type == "cpu" else count
        if count <= step:
            return self._crops(*checked, size)
        blocks = ([array[start : start + step] for array in checked] for start in range(0, count, step))
        return torch.cat([self._crops(lat, lng, across, turn, size) for lat, lng, across, turn in blocks])

    def _crops(
        self, latitude: np.ndarray, longitude: np.ndarray, degrees: np.ndarray, rotation: np.ndarray, size: int
    ) -> torch.Tensor:
        rays = _rays(latitude, longitude, degrees, rotation, size, self.device, torch.float32)
        count = len(rays)
        lat, lng = _angles(rays)
        out = torch.empty(count, 3, size, size, device=self.device)
        pixels = degrees / size / (180 / self.height)
        chosen = np.clip(np.rint(np.log2(pixels)), 0, len(self._levels) - 1).astype(int)
        for number in np.unique(chosen):
            rows = torch.from_numpy(np.flatnonzero(chosen == number)).to(self.device)
            level = self._levels[number]
            # one column and row more on each side
            height, width = level.shape[1], level.shape[2]
            x = lng[rows] * ((width - 2) / (torch.pi * width))
            y = lat[rows] * (-2 * (height - 2) / (torch.pi * height))
            # all crops below each other are one grid over one picture
            grid = torch.stack([x, y], dim=-1).reshape(1, -1, size, 2)
            found = F.grid_sample(level[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
            out[rows] = found.reshape(3, -1, size, size).transpose(0, 1)
        return out


def _checked(
    latitude: "ArrayLike", longitude: "ArrayLike", degrees: "ArrayLike", rotation: "ArrayLike", size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `crop_rays` as float64 [n] each."""
    lat, lng = check_coordinates(latitude, longitude, name="centres of crops")
    if lat.ndim != 1:
        raise ValueError(f"centres of crops must be [n], not of shape {lat.shape}")
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    across, turn = (np.asarray(value, dtype=np.float64) for value in (degrees, rotation))
    for name, value in (("degrees", across), ("rotation", turn)):
        if value.shape not in ((), lat.shape):
            raise ValueError(f"{name} must be one number or [{len(lat)}], one per centre, not of shape {value.shape}")
    if not ((across > 0) & (across <= MAX_DEGREES)).all():
        raise ValueError(f"degrees across a crop must lie above 0 and at most {MAX_DEGREES:g}, not {across}")
    if not np.isfinite(turn).all():
        raise ValueError(f"rotation={turn} must be finite numbers of degrees")
    return lat, lng, np.broadcast_to(across, lat.shape), np.broadcast_to(turn, lat.shape)


def _rays(
    lat: np.ndarray,
    lng: np.ndarray,
    across: np.ndarray,
    turn: np.ndarray,
    size: int,
    device: str | torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`crop_rays` of checked arguments."""
    phi, lam, turned = np.radians(lat), np.radians(lng), np.radians(turn)
    zero = np.zeros_like(phi)
    centre = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1)
    east = np.stack([-np.sin(lam), np.cos(lam), zero], axis=1)
    north = np.stack([-np.sin(phi) * np.cos(lam), -np.sin(phi) * np.sin(lam), np.cos(phi)], axis=1)
    half = np.tan(np.radians(across) / 2)[:, None]
    sine, cosine = np.sin(turned)[:, None], np.cos(turned)[:, None]
    frame = np.stack([centre, half * (east * cosine - north * sine), half * (north * cosine + east * sine)])
    middle, right, up = torch.from_numpy(frame).to(device, dtype)[:, :, None, None, :]
    steps = ((torch.arange(size, device=device, dtype=dtype) + 0.5) * 2 / size - 1)[:, None]
    return middle + right * steps[None, :, :] + up * -steps[:, None, :]


def _angles(rays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latitude, longitude) in radians."""
    x, y, z = rays.unbind(-1)
    return torch.atan2(z, torch.hypot(x, y)), torch.atan2(y, x)


def _wrapped(level: torch.Tensor) -> torch.Tensor:
    """[3, height, width] with a border of one pixel: the other side of the dateline, and of the poles."""
    wide = torch.cat([level[:, :, -1:], level, level[:, :, :1]], dim=2)
    # over the pole lies the meridian half way round
    half = level.shape[2] // 2
    top, bottom = (torch.roll(level[:, row], half, dims=1)[:, None] for row in (0, -1))
    beyond = [torch.cat([row[:, :, -1:], row, row[:, :, :1]], dim=2) for row in (top, bottom)]
    return torch.cat([beyond[0], wide, beyond[1]], dim=1).contiguous()


def _even_rows(level: torch.Tensor) -> torch.Tensor:
    """[3, height, width], each pixel averaged along its parallel over as many kilometres as it is high."""
    _, height, width = level.shape
    latitude = (0.5 - (torch.arange(height, device=level.device, dtype=torch.float64) + 0.5) / height) * torch.pi
    widths = (1 / torch.cos(latitude)).clamp(max=width)
    columns = torch.arange(width, device=level.device)
    out = torch.empty_like(level)
    for start in range(0, height, ROWS_PER_BLOCK):
        rows = level[:, start : start + ROWS_PER_BLOCK].double()
        span = widths[start : start + ROWS_PER_BLOCK]
        total = rows.sum(dim=2, keepdim=True)
        # integral from the left edge to each pixel's left edge
        before = rows.cumsum(dim=2) - rows
        sums = []
        for edge in (0.5 + span / 2, 0.5 - span / 2):
            whole = torch.floor(edge)
            place = columns[None, :] + whole.long()[:, None]
            index = (place % width).expand(3, -1, -1)
            turns = torch.div(place, width, rounding_mode="floor")
            part = (edge - whole)[:, None] * rows.gather(2, index)
            sums.append(before.gather(2, index) + turns * total + part)
        out[:, start : start + ROWS_PER_BLOCK] = ((sums[0] - sums[1]) / span[:, None]).float()
    return out


__all__ = ["MAX_DEGREES", "EarthImage", "crop_coordinates", "crop_rays"]
