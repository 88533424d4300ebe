"""The tab that cuts a crop out of a picture of the Earth and places it: here the truth is known."""

import base64
import io
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

import geobased.geography
from geobased.cli.sources import quiet_transformers
from geobased.geography.coordinates import from_unit_vectors
from geobased.pipelines.geolocalization_cells import MAX_CELLS
from geobased.pipelines.geolocalization_map import LocatedImage, map_fragment, thumbnail
from geobased.training.earth_crops import crop_picture
from geobased.training.earth_projection import EarthImage, crop_rays

from .geolocalization_locate import EMPTY
from .geolocalization_models import Models
from .geolocalization_uploads import errors_as_messages
from .serving import MODEL_QUEUE, gr, on_gpu

# resolved: tools read the package through links
BLUE_MARBLE_FILE = Path(geobased.geography.__file__).resolve().parent / "data" / "blue_marble.jpg"
# where, and how wide, the crops were that earthclip-mini learned from
LATITUDES, DEGREES = (-60.0, 84.0), (2.0, 8.0)
START = (36.0, 15.0, 6.0)
TOP_K = 5
SHOWN_PIXELS, WORLD_WIDTH = 360, 1350
OUTLINE_POINTS = 12
HOW = (
    "Click on the picture, or type a place: the square around it is cut out and given to the model, which sees nothing else."
    " {} It was trained on crops of this picture, and has seen most of these places."
)
CLICKS = """
element.addEventListener('click', event => {
  const picture = event.target.closest('svg');
  if (!picture) return;
  const area = picture.getBoundingClientRect();
  const x = (event.clientX - area.left) / area.width, y = (event.clientY - area.top) / area.height;
  trigger('click', {latitude: NORTH - HEIGHT * y, longitude: 360 * x - 180});
});
""".replace("NORTH", f"{LATITUDES[1]:g}").replace("HEIGHT", f"{LATITUDES[1] - LATITUDES[0]:g}")
_lock = threading.Lock()


@lru_cache(maxsize=1)
def _earth_image() -> EarthImage:
    return EarthImage.from_file(BLUE_MARBLE_FILE)


def earth_image() -> EarthImage:
    """The Blue Marble that comes with the package (NASA, public domain), read when it is first asked for."""
    with _lock:
        return _earth_image()


def blue_marble_crop(latitude: float, longitude: float, degrees: float, size: int) -> Image.Image:
    """The square around a place, north up, `degrees` across, [size, size] pixels.

    Raises `ValueError` for places and angles that are none.
    """
    return crop_picture(earth_image().crops([latitude], [longitude], degrees, size=size)[0])


def crop_outline(latitude: float, longitude: float, degrees: float) -> np.ndarray:
    """Edge [points, 2] of such a square, (longitude, latitude) in degrees; longitudes run on across the date line."""
    rays = crop_rays([latitude], [longitude], degrees, 0.0, OUTLINE_POINTS)[0].double().numpy()
    edge = np.concatenate([rays[0], rays[1:, -1], rays[-1, -2::-1], rays[-2:0:-1, 0]])
    lat, lng = from_unit_vectors(edge)
    return np.stack([longitude + (lng - longitude + 180) % 360 - 180, lat], axis=1)


def blue_marble_tab(models: Models) -> Callable[[], None]:
    """Builds the tab; its endpoint is /locate_blue_marble. Returns what a page runs when the tab is opened."""

    @on_gpu
    def locate_blue_marble(latitude: float, longitude: float, degrees: float) -> tuple[str, str, str]:
        """Cut a square out of NASA's Blue Marble and tell where the model places it, and how far that is from the truth.

        Args:
            latitude: of the middle, -60 to 84 degrees.
            longitude: of the middle, -180 to 180 degrees.
            degrees: across the square, 2 to 8.

        Returns:
            A sentence; a map with the true place beside the answer as HTML, for the page that holds the countries' outlines; and
            the square's outline as SVG.
        """
        with errors_as_messages():
            pipe, areas = models.pipe(models.first), models.areas(models.first)
            crop = blue_marble_crop(latitude, longitude, degrees, pipe.preprocessor.shortest_edge)
            with quiet_transformers():
                answer = pipe(crop, top_k=TOP_K, cells=MAX_CELLS)
            cells = answer[0].pop("cells", [])
            image = LocatedImage(
                f"The square around {latitude:.1f}, {longitude:.1f}",
                answer,
                thumbnail=thumbnail(blue_marble_crop(latitude, longitude, degrees, SHOWN_PIXELS)),
                cells=() if areas is None else areas.areas(cells),
                exact_cells=areas is not None and areas.exact,
                truth=(latitude, longitude),
            )
            return told(image), map_fragment([image], with_land=False), _drawn(latitude, longitude, degrees)

    def picked(event: gr.EventData) -> tuple[float, float]:
        latitude, longitude = np.clip(event.latitude, *LATITUDES), np.clip(event.longitude, -180, 180)
        return round(float(latitude), 2), round(float(longitude), 2)

    sizes = f"earthclip-mini knows squares of {DEGREES[0]:g} to {DEGREES[1]:g} degrees with at least a quarter of land."
    gr.Markdown(HOW.format(sizes))
    globe = gr.HTML(_drawn(*START), html_template=_world_picture(), js_on_load=CLICKS, padding=False, elem_id="globe")
    with gr.Row():
        latitude = gr.Number(START[0], label="Latitude, degrees", minimum=LATITUDES[0], maximum=LATITUDES[1], elem_id="latitude")
        longitude = gr.Number(START[1], label="Longitude, degrees", minimum=-180, maximum=180, elem_id="longitude")
        degrees = gr.Number(START[2], label="Width, degrees", minimum=DEGREES[0], maximum=DEGREES[1], elem_id="degrees")
    start = gr.Button("Locate this square", variant="primary", elem_id="locate-crop")
    status = gr.Markdown(elem_classes="status", elem_id="crop-status")
    world = gr.HTML(EMPTY.format("The answer appears here, beside the true place."), label="Map", padding=False)
    place, outputs = [latitude, longitude, degrees], [status, world, globe]
    start.click(locate_blue_marble, place, outputs, api_name="locate_blue_marble", **MODEL_QUEUE)
    clicked = globe.click(picked, None, [latitude, longitude], api_visibility="private")
    clicked.then(locate_blue_marble, place, outputs, api_visibility="private", **MODEL_QUEUE)
    for number in place:
        number.submit(locate_blue_marble, place, outputs, api_visibility="private", **MODEL_QUEUE)

    def preload() -> None:
        """Reads the picture, which takes seconds, while a visitor looks for a place."""
        earth_image()

    return preload


def told(image: LocatedImage) -> str:
    """A sentence about the distance from the best to the true place, and whether the error radius holds."""
    best, distance = image.predictions[0], image.distance_km
    assert distance is not None
    side = "inside" if distance <= best["error_radius_km"] else "outside"
    unsure = " The model would rather not say: the answer is too uncertain." if best["abstain"] else ""
    return (
        f"The best place is **{distance:,.0f} km** from the true one, {side} its error radius of"
        f" {best['error_radius_km']:,.0f} km.{unsure}"
    )


def _drawn(latitude: float, longitude: float, degrees: float) -> str:
    """A crop's outline on the picture of the world, also where it crosses the date line."""
    ring = "L".join(f"{x:.2f} {-y:.2f}" for x, y in crop_outline(latitude, longitude, degrees).tolist())
    return "".join(f'<path d="M{ring}Z" transform="translate({shift} 0)"/>' for shift in (-360, 0, 360))


def _world_picture() -> str:
    """The template of a drawing that shows the whole picture, and an outline on it."""
    with Image.open(BLUE_MARBLE_FILE) as whole:
        # a JPEG is decoded at a fraction of its size
        whole.draft("RGB", (WORLD_WIDTH, WORLD_WIDTH // 2))
        small = whole.convert("RGB").resize((WORLD_WIDTH, WORLD_WIDTH // 2))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<div class="globe"><svg viewBox="-180 {-LATITUDES[1]:g} 360 {LATITUDES[1] - LATITUDES[0]:g}" role="img"'
        ' aria-label="picture of the Earth from space; a click'
        ' chooses a place, as the fields for latitude and longitude below do">'
        f'<image href="data:image/jpeg;base64,{data}" x="-180" y="-90" width="360" height="180" preserveAspectRatio="none"/>'
        "${value}</svg></div>"
    )


__all__ = ["BLUE_MARBLE_FILE", "blue_marble_crop", "blue_marble_tab", "crop_outline", "earth_image", "told"]
