"""Maps of answers that open without a network: one HTML file with drawings in it, or a PNG."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geobased.geography.coordinates import haversine_km
from geobased.whole_file import whole_file

from .geolocalization_answers import place_title
from .geolocalization_cells import CellArea

SUFFIXES = (".html", ".png")
# degrees: what is smaller cannot be seen on these maps
SIMPLIFICATION, SMALLEST_AREA = 0.08, 0.01
# images that get a map of their own in an HTML file; thousands would make it slow to open
MAX_SECTIONS = 100
THUMBNAIL_PIXELS = 360
EARTH_KM_PER_DEGREE = 111.195
# a circle of a quarter of the way around is a hemisphere, and larger ones say nothing
MAX_CIRCLE_KM = 9_900.0
# beside each other: what crosses the date line goes on
LAND_COPIES = "".join(f'<use href="#land" x="{shift}"/>' for shift in (-360, 0, 360))
COLORS = ("#d1242f", "#bc4c00", "#9a6700", "#57606a", "#8c959f")
# of a page of its own
PAGE_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:66rem;margin:2rem auto;padding:0 1rem}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#14181d}}
"""
DARK = (
    "--sea:#1d2a36;--land:#3f4852;--border:#707b87;--quiet:#b3b9c0;--cell:#b78cff;--truth:#3fb950;--unsure:#b3b9c0;--card:#1b2129"
)
# of the maps, wherever they are: nothing outside .places changes (copies of the land know no ancestors), and what a page says of
# all its tables does not hold in it
STYLE = """
.places{--sea:#eef4f9;--land:#e5e3da;--border:#aaa;--line:#8884;--quiet:#5f666d;--cell:#6639ba;--truth:#1a7f37;--unsure:#57606a;
--card:#fff}
.dark .places{DARK}
.places section{display:flex;flex-wrap:wrap;gap:1rem 1.5rem;align-items:flex-start;border-top:1px solid var(--line);
padding:1.25rem 0}
.places section>div{flex:1 1 22rem;min-width:0}
.places li{font-size:inherit}
.places h2{font-size:1.05rem;margin:0 0 .5rem;overflow-wrap:anywhere}
.places table{display:block;overflow-x:auto;margin:.75rem 0 0!important;padding:0!important;border:0!important;
border-collapse:collapse;font-variant-numeric:tabular-nums}
.places tr,.places th,.places td{border:0!important}
.places th,.places td{padding:.3rem .5rem!important;text-align:right;white-space:nowrap!important}
.places th:first-child,.places td:first-child{padding-left:0!important}
.places th{font-size:.85em;color:var(--quiet);font-weight:600}
.places tr{border-bottom:1px solid var(--line)!important}
.places th:nth-child(2),.places td:nth-child(2){text-align:left;white-space:normal!important;min-width:8rem}
.places figure{position:relative;margin:0}
.places figcaption{font-size:.85em;color:var(--quiet);margin:.4rem 0 0}
.places svg{display:block;width:100%;height:auto;touch-action:pan-y;background:var(--sea);border:1px solid var(--line);
border-radius:6px;cursor:grab}
.places .zoom{position:absolute;top:.5rem;right:.5rem;display:flex;flex-direction:column;gap:1px}
.places .zoom button{width:2rem;height:2rem;padding:0;border:1px solid var(--line);border-radius:4px;background:var(--card);
color:inherit;font:600 1rem/1 system-ui,sans-serif;cursor:pointer}
.places :focus-visible{outline:2px solid #2563eb;outline-offset:2px}
.places img{display:block;max-width:100%;height:9rem;width:auto;border-radius:6px}
.places-land{fill:var(--land);stroke:var(--border);stroke-width:.6;vector-effect:non-scaling-stroke}
.places .cell{fill:var(--cell);stroke:var(--cell);stroke-opacity:.45;stroke-width:.6;vector-effect:non-scaling-stroke}
.places .radius{fill:#d1242f;fill-opacity:.06;stroke:#d1242f;stroke-width:1.25;vector-effect:non-scaling-stroke}
.places .radius.unsure{fill:none;stroke:var(--unsure);stroke-dasharray:5 4}
.places .place{stroke:#fff;stroke-width:1;vector-effect:non-scaling-stroke}
.places .place.unsure{fill:none;stroke:var(--unsure);stroke-width:2}
.places .place.truth{fill:none;stroke:var(--truth);stroke-width:3}
.places .gap{fill:none;stroke:var(--truth);stroke-width:1.5;stroke-dasharray:3 3;vector-effect:non-scaling-stroke}
.places .note,.places footer{color:var(--quiet)}
.places footer{font-size:.85em}
.places .abstains{border-left:4px solid var(--unsure);padding:.35rem .75rem;margin:.75rem 0 0;font-weight:600}
""".replace("DARK", DARK)
# maps are zoomed by their buttons, the wheel, two clicks or + and -, moved by dragging or arrows, and whole again by 0. It
# listens to the page, so that maps which come later are served as well.
ZOOM_SCRIPT = """
(() => {
  const mapOf = event => event.target.closest && event.target.closest('.places svg[viewBox]');
  const view = map => map.getAttribute('viewBox').split(' ').map(Number);
  const show = (map, box) => {
    map.dataset.whole = map.dataset.whole || map.getAttribute('viewBox');
    const whole = map.dataset.whole.split(' ').map(Number);
    box[2] = Math.min(whole[2], Math.max(box[2], whole[2] / 60));
    box[3] = box[2] * whole[3] / whole[2];
    for (const i of [0, 1]) box[i] = Math.min(Math.max(box[i], whole[i]), whole[i] + whole[i + 2] - box[i + 2]);
    map.setAttribute('viewBox', box.map(value => value.toFixed(3)).join(' '));
    const scale = box[2] / whole[2];
    for (const mark of map.querySelectorAll('circle.place')) {
      mark.dataset.r = mark.dataset.r || mark.getAttribute('r');
      mark.setAttribute('r', mark.dataset.r * Math.sqrt(scale));
    }
  };
  const zoom = (map, factor, x, y) => {
    const box = view(map), size = [box[2] * factor, box[3] * factor];
    show(map, [box[0] + x * (box[2] - size[0]), box[1] + y * (box[3] - size[1]), ...size]);
  };
  const at = (map, event) => {
    const area = map.getBoundingClientRect();
    return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
  };
  document.addEventListener('wheel', event => {
    const map = mapOf(event);
    if (!map || !(event.ctrlKey || map === document.activeElement)) return;
    event.preventDefault();
    zoom(map, event.deltaY < 0 ? 0.8 : 1.25, ...at(map, event));
  }, {passive: false});
  document.addEventListener('click', event => {
    const button = event.target.closest && event.target.closest('.places .zoom button');
    const map = button && button.closest('figure').querySelector('svg[viewBox]');
    if (!map) return;
    if (button.dataset.zoom === '0') map.dataset.whole && show(map, map.dataset.whole.split(' ').map(Number));
    else zoom(map, button.dataset.zoom === '+' ? 0.6 : 1 / 0.6, 0.5, 0.5);
  });
  document.addEventListener('dblclick', event => {
    const map = mapOf(event);
    if (map) zoom(map, event.shiftKey ? 2 : 0.5, ...at(map, event));
  });
  let held = null;
  document.addEventListener('pointerdown', event => {
    held = mapOf(event) && {map: mapOf(event), x: event.clientX, y: event.clientY, box: view(mapOf(event))};
  });
  document.addEventListener('pointermove', event => {
    if (!held || !event.buttons) return;
    const area = held.map.getBoundingClientRect(), box = [...held.box];
    box[0] -= (event.clientX - held.x) / area.width * box[2];
    box[1] -= (event.clientY - held.y) / area.height * box[3];
    show(held.map, box);
  });
  document.addEventListener('pointerup', () => { held = null; });
  document.addEventListener('keydown', event => {
    const map = mapOf(event), move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!map) return;
    if (event.key === '+' || event.key === '=') zoom(map, 0.7, 0.5, 0.5);
    else if (event.key === '-') zoom(map, 1 / 0.7, 0.5, 0.5);
    else if (event.key === '0' && map.dataset.whole) show(map, map.dataset.whole.split(' ').map(Number));
    else if (move) {
      const box = view(map);
      show(map, [box[0] + move[0] * box[2] / 8, box[1] + move[1] * box[3] / 8, box[2], box[3]]);
    } else return;
    event.preventDefault();
  });
})();
"""
DARK_PAGE = f"@media (prefers-color-scheme:dark){{.places{{{DARK}}}}}"


@dataclass(frozen=True)
class LocatedImage:
    """An image on a map.

    Args:
        name: of the image.
        predictions: what the pipeline gives for it, best first; empty if it could not be read.
        error: why it could not be read.
        thumbnail: a small JPEG, which the map then holds.
        cells: geocells to shade, best first (see `CellAreas.areas`).
        exact_cells: whether their outlines are the geocells' own.
        truth: (latitude, longitude) in degrees of where it was taken, if that is known.
    """

    name: str
    predictions: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    thumbnail: bytes | None = None
    cells: tuple[CellArea, ...] = ()
    exact_cells: bool = False
    truth: tuple[float, float] | None = None

    @property
    def distance_km(self) -> float | None:
        """From the best place to the true one; None if there is no answer or no known truth."""
        if self.truth is None or not self.predictions:
            return None
        best = self.predictions[0]
        return float(haversine_km(best["latitude"], best["longitude"], *self.truth))


@lru_cache(maxsize=1)
def country_outlines() -> list[np.ndarray]:
    """Outer rings [points, 2] of all countries, (longitude, latitude) in degrees, simplified for maps of the world.

    They are those of the world geocells that come with the package. Needs shapely.
    """
    import shapely

    from geobased.geography.geocell_collection import Geocells

    cells = Geocells.world()
    countries = [
        shapely.coverage_union_all(cells.polygons[cells.country_codes == code]) for code in np.unique(cells.country_codes)
    ]
    # borders stay shared, so that no gaps open between neighbours
    parts = shapely.get_parts(shapely.coverage_simplify(np.array(countries, dtype=object), SIMPLIFICATION))
    rings = shapely.get_exterior_ring(parts[shapely.area(parts) >= SMALLEST_AREA])
    return [shapely.get_coordinates(ring) for ring in rings]


def thumbnail(image: str | os.PathLike[str] | Image.Image) -> bytes:
    """A small JPEG of an image's pixels alone. Raises `UnreadableImageError`."""
    from geobased.modeling_streetclip.image_decoding import decode_picture

    picture = decode_picture(image, jpeg_edge=THUMBNAIL_PIXELS)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def save_map(path: str | os.PathLike[str], images: Sequence[LocatedImage]) -> None:
    """Draws where images may have been taken. The file appears complete or not at all and opens without a network.

    Args:
        path: ends in .html (a map of the world, then each image with its places and the best one's error radius) or .png (a map
            of the world; needs matplotlib).

    Raises `ValueError` for another ending.
    """
    path = Path(path)
    check_map_path(path)
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".html":
            temporary.write_text(_html(images), encoding="utf-8")
        else:
            _png(temporary, images)


def check_map_path(path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` unless a map can be written there: the ending is known and the folder exists."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the map {path} must end in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the map {path} cannot be written: there is no folder {path.parent}")


def circle_around(latitude: float, longitude: float, radius_km: float, points: int = 90) -> np.ndarray:
    """Polygon [n, 2], (longitude, latitude) in degrees, of what lies within radius_km of a place on the sphere.

    Longitudes run on across the date line, past 180. A circle with a pole in it is closed along the map's edge.
    """
    angle = np.radians(radius_km / EARTH_KM_PER_DEGREE)
    bearing = np.linspace(0, 2 * np.pi, points + 1)
    lat = np.radians(latitude)
    sine = np.sin(lat) * np.cos(angle) + np.cos(lat) * np.sin(angle) * np.cos(bearing)
    edge = np.arcsin(np.clip(sine, -1, 1))
    turn = np.arctan2(np.sin(bearing) * np.sin(angle) * np.cos(lat), np.cos(angle) - np.sin(lat) * sine)
    ring = np.stack([longitude + np.degrees(np.unwrap(turn)), np.degrees(edge)], axis=1)
    if abs(ring[-1, 0] - ring[0, 0]) > 180:
        pole = 90.0 if latitude >= 0 else -90.0
        ring = np.concatenate([ring, [[ring[-1, 0], pole], [ring[0, 0], pole]]])
    return ring


# HTML


def _html(images: Sequence[LocatedImage]) -> str:
    count = sum(bool(image.predictions) for image in images)
    title = f"Where {count:,} image{'' if count == 1 else 's'} may have been taken"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{PAGE_STYLE}{STYLE}{DARK_PAGE}</style><script>{ZOOM_SCRIPT}</script></head>\n"
        f"<body><h1>{title}</h1>\n{map_fragment(images)}</body></html>\n"
    )


def map_fragment(images: Sequence[LocatedImage], max_sections: int = MAX_SECTIONS, *, with_land: bool = True) -> str:
    """A map of the world and a section for each image, for a page that holds `STYLE`; it is dark in an element of class dark.

    with_land=False leaves out the countries' outlines, half a megabyte, for pages that hold `land_fragment` once.
    """
    located = [image for image in images if image.predictions]
    failed = [image for image in images if not image.predictions]
    parts = [
        land_fragment() if with_land else "",
        _world(located) if located else "",
        *(_section(image) for image in located[:max_sections]),
    ]
    if len(located) > max_sections > 0:
        parts.append(f'<p class="note">On the map of the world alone: {len(located) - max_sections:,} more.</p>\n')
    if failed:
        rows = "".join(f"<li>{escape(image.name)}: {escape(image.error or 'no place')}</li>" for image in failed)
        parts.append(f"<h2>Not located</h2><ul>{rows}</ul>\n")
    parts.append(
        "<footer><p>Places are a model's guesses from pixels alone. Borders: Natural Earth (public domain), simplified. Maps zoom"
        " by their buttons, two clicks, or + and - once clicked on; 0 shows all.</p></footer>\n"
    )
    return f'<div class="places">{"".join(parts)}</div>'


@lru_cache(maxsize=1)
def land_fragment() -> str:
    """The outlines of all countries, not shown themselves, which maps refer to."""
    land = "".join(f"M{_path(ring)}Z" for ring in country_outlines())
    return (
        '<svg style="position:absolute;width:0;height:0;border:0" aria-hidden="true"><defs>'
        f'<path id="land" class="places-land" d="{land}"/><clipPath id="land-shape"><use href="#land"/></clipPath></defs></svg>\n'
    )


def _path(points: np.ndarray) -> str:
    """Points (longitude, latitude) as SVG has them: y grows downwards."""
    return "L".join(f"{x:.2f} {-y:.2f}" for x, y in points.tolist())


def _map(view: str, label: str, content: str, caption: str = "") -> str:
    """A drawing that can be zoomed, with its buttons."""
    buttons = "".join(
        f'<button type="button" data-zoom="{kind}" aria-label="{name}">{sign}</button>'
        for kind, name, sign in (("+", "zoom in", "+"), ("-", "zoom out", "&minus;"), ("0", "show all", "&#8634;"))
    )
    told = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure><svg viewBox="{view}" tabindex="0" role="img" aria-label="{escape(label)}">{content}</svg>'
        f'<div class="zoom">{buttons}</div>{told}</figure>\n'
    )


def _world(located: Sequence[LocatedImage]) -> str:
    # of many images they would hide each other
    parts = []
    if len(located) == 1:
        circle = _circle(located[0])
        circles = "".join(f'<g transform="translate({shift} 0)">{circle}</g>' for shift in (-360, 0, 360)) if circle else ""
        parts.append(_cells(located[0], -180, 180) + circles)
    truths = False
    for image in located:
        best = image.predictions[0]
        title = f"{image.name}: {place_title(best)}, {best['score']:.1%}"
        unsure = _abstains(image)
        if unsure:
            title += ", too uncertain to say"
        if image.truth is not None:
            truths = True
            parts.append(_gap(image, best["longitude"], 1.0))
            parts.append(_truth(image, image.truth[1], 2.2))
        parts.append(
            f'<circle class="place{" unsure" if unsure else ""}" cx="{best["longitude"]:.3f}" cy="{-best["latitude"]:.3f}"'
            f' r="1.6" fill="{COLORS[0]}"><title>{escape(title)}</title></circle>'
        )
    told = ["Filled: the best place of an image."]
    if any(map(_abstains, located)):
        told.append("Hollow and grey: the model is too uncertain to say.")
    if truths:
        told.append("Green ring: the true place.")
    label = "map of the world with the best place of each image"
    return _map("-180 -84 360 142", label, f'<use href="#land"/>{"".join(parts)}', " ".join(told))


def _section(image: LocatedImage) -> str:
    picture = ""
    if image.thumbnail is not None:
        data = base64.b64encode(image.thumbnail).decode("ascii")
        picture = f'<img alt="{escape(image.name)}" src="data:image/jpeg;base64,{data}">'
    rows = "".join(
        f"<tr><td>{rank}</td><td>{escape(place_title(place))}</td><td>{place['score']:.1%}</td>"
        f"<td>{place['latitude']:.2f}, {place['longitude']:.2f}</td><td>{place['error_radius_km']:,.0f} km</td></tr>"
        for rank, place in enumerate(image.predictions, 1)
    )
    note = ""
    if _abstains(image):
        note = '<p class="abstains">The model would rather not say: the answer is too uncertain. These are mere guesses.</p>'
    if image.distance_km is not None:
        note += f'<p class="distance">The best place is {image.distance_km:,.0f} km from the true one.</p>'
    return (
        f"<section><div><h2>{escape(image.name)}</h2>{picture}{note}<table><thead><tr><th></th><th>place</th><th>probability</th>"
        f"<th>latitude, longitude</th><th>radius</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"<div>{_close_up(image)}</div></section>\n"
    )


def _abstains(image: LocatedImage) -> bool:
    return bool(image.predictions[0].get("abstain"))


def _cells(image: LocatedImage, west: float, east: float) -> str:
    """Geocells between two longitudes, the likeliest opaque, in degrees, where there is land: cells are parts of it."""
    if not image.cells:
        return ""
    highest = max(area.probability for area in image.cells)
    groups = []
    # browsers cut by one copy of the land well, and by several at once not at all: each copy has a group of its own
    for turn in (-360, 0, 360):
        low, high = max(west, turn - 180), min(east, turn + 180)
        paths = []
        for area in image.cells if low < high else ():
            outlines = [
                f"M{_path(ring + (shift - turn, 0))}Z"
                for ring in area.rings
                for shift in (-360, 0, 360)
                if ring[:, 0].max() + shift > low and ring[:, 0].min() + shift < high
            ]
            # small probabilities would not be seen beside large ones
            opacity = 0.08 + 0.62 * (area.probability / highest) ** 0.5
            if outlines:
                paths.append(
                    f'<path class="cell" fill-opacity="{opacity:.2f}" d="{"".join(outlines)}">'
                    f"<title>geocell {area.geocell}: {area.probability:.1%}</title></path>"
                )
        if paths:
            groups.append(f'<g transform="translate({turn} 0)" clip-path="url(#land-shape)">{"".join(paths)}</g>')
    return "".join(groups)


def _circle(image: LocatedImage) -> str:
    """The error radius of the best place, in degrees."""
    best = image.predictions[0]
    if best["error_radius_km"] >= MAX_CIRCLE_KM:
        return ""
    ring = circle_around(best["latitude"], best["longitude"], best["error_radius_km"])
    return f'<path class="radius{" unsure" if _abstains(image) else ""}" d="M{_path(ring)}Z"/>'


def _truth(image: LocatedImage, x: float, radius: float) -> str:
    assert image.truth is not None
    title = f"{image.name}: the true place, {image.truth[0]:.3f}, {image.truth[1]:.3f}"
    return (
        f'<circle class="place truth" cx="{x:.3f}" cy="{-image.truth[0]:.3f}" r="{radius:.3f}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _gap(image: LocatedImage, best_x: float, narrow: float) -> str:
    """A line between the best and the true place, by the shorter way around; best_x is the best place's longitude on the map."""
    assert image.truth is not None
    best = image.predictions[0]
    step = (image.truth[1] - best["longitude"] + 180) % 360 - 180
    return f'<path class="gap" d="M{best_x:.3f} {-best["latitude"]:.3f}L{best_x + narrow * step:.3f} {-image.truth[0]:.3f}"/>'


def _close_up(image: LocatedImage) -> str:
    """The part of the world that shows the best place with its radius and geocells, and the other places near it."""
    best = image.predictions[0]
    latitude, longitude, radius = best["latitude"], best["longitude"], best["error_radius_km"]
    wanted = max(1.3 * radius, 1.3 * (image.distance_km or 0.0))
    reach = min(max(wanted / EARTH_KM_PER_DEGREE, 5.0), 60.0)
    # a degree of longitude is shorter away from the equator
    narrow = max(np.cos(np.radians(latitude)), 0.2)

    def x(degrees: float) -> float:
        return narrow * (longitude + (degrees - longitude + 180) % 360 - 180)

    left, width = narrow * longitude - 1.4 * reach, 2.8 * reach
    cells = _cells(image, longitude - 1.4 * reach / narrow, longitude + 1.4 * reach / narrow)
    marks = [
        f'<circle class="place{" unsure" if _abstains(image) else ""}" cx="{x(place["longitude"]):.3f}"'
        f' cy="{-place["latitude"]:.3f}" r="{reach / 40 * (1.4 if rank == 0 else 1):.3f}"'
        f' fill="{COLORS[min(rank, len(COLORS) - 1)]}">'
        f"<title>{rank + 1}. {escape(place_title(place))}, {place['score']:.1%}</title></circle>"
        for rank, place in reversed(list(enumerate(image.predictions)))
    ]
    told = ["Large dot: the best place, small dots: the next ones." if len(image.predictions) > 1 else "Dot: the best place."]
    if image.cells:
        outlines = "" if image.exact_cells else ", drawn as what is nearest to its centre"
        told.append(f"Shaded: geocells{outlines}, the darkest with a probability of {image.cells[0].probability:.1%}.")
    if radius < MAX_CIRCLE_KM:
        told.append(f"{'Dashed circle' if _abstains(image) else 'Circle'}: the error radius of the best place.")
    if image.truth is not None:
        told.append("Green ring: the true place.")
        marks.insert(0, _gap(image, x(longitude), float(narrow)) + _truth(image, x(image.truth[1]), reach / 40 * 2))
    content = f'<g transform="scale({narrow:.4f} 1)">{LAND_COPIES}{cells}{_circle(image)}</g>{"".join(marks)}'
    view = f"{left:.3f} {-latitude - reach:.3f} {width:.3f} {2 * reach:.3f}"
    return _map(view, f"map around {place_title(best)}", content, " ".join(told))


# PNG


def _png(path: Path, images: Sequence[LocatedImage]) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    located = [image for image in images if image.predictions]
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlim=(-180, 180), ylim=(-58, 84), facecolor="#eef4f9", xticks=[], yticks=[])
    axes.add_collection(PolyCollection(country_outlines(), facecolors="#e5e3da", edgecolors="#aaaaaa", linewidths=0.3))
    for number, image in enumerate(located, 1):
        best = image.predictions[0]
        if best["error_radius_km"] < MAX_CIRCLE_KM:
            circle = circle_around(best["latitude"], best["longitude"], best["error_radius_km"])
            # the part beyond the date line is the copy's
            rings = [circle + (shift, 0) for shift in (-360, 0, 360)]
            axes.add_collection(PolyCollection(rings, facecolors="#d1242f18", edgecolors="#d1242f", linewidths=0.6))
        for rank, place in reversed(list(enumerate(image.predictions))):
            size, color = (28 if rank == 0 else 10), COLORS[min(rank, len(COLORS) - 1)]
            axes.scatter(place["longitude"], place["latitude"], s=size, c=color, edgecolors="white", linewidths=0.5, zorder=3)
        if 1 < len(located) <= MAX_SECTIONS:
            place_of_text = (best["longitude"], best["latitude"])
            axes.annotate(str(number), place_of_text, xytext=(4, 4), textcoords="offset points", fontsize=7, zorder=4)
    if len(located) == 1:
        best = located[0].predictions[0]
        axes.set_title(f"{place_title(best)} ({best['score']:.1%}, within {best['error_radius_km']:,.0f} km)", fontsize=10)
    figure.savefig(path, dpi=150)


__all__ = [
    "STYLE",
    "ZOOM_SCRIPT",
    "LocatedImage",
    "check_map_path",
    "circle_around",
    "country_outlines",
    "land_fragment",
    "map_fragment",
    "save_map",
    "thumbnail",
]
