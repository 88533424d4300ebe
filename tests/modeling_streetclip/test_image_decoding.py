"""Decoding: orientation, unusual images, and every kind of file that is no usable image."""

import io
import itertools
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from geobased.modeling_streetclip import image_decoding
from geobased.modeling_streetclip.image_decoding import UnreadableImageError, decode_image, decode_images

ORIENTATION, GPS = 0x0112, 0x8825


def picture(height: int = 48, width: int = 64, mode: str = "RGB") -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + 2 * y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def with_exif(orientation: int | None = None, gps: dict | None = None, kind: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    if gps is not None:
        exif[GPS] = gps
    return encoded(picture(), kind, exif=exif.tobytes(), **options)


PARIS = {1: "N", 2: (48.0, 51.0, 24.0), 3: "E", 4: (2.0, 21.0, 3.0)}
LIMA = {1: "S", 2: (12.0, 2.0, 46.0), 3: "W", 4: (77.0, 1.0, 41.0)}


# --- sources ----------------------------------------------------------------------------------------------------------


def test_sources(tmp_path):
    data = encoded(picture())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, str(path), path, io.BytesIO(data), picture()):
        image = decode_image(source)
        assert image.dtype == torch.uint8
        assert torch.equal(image, pixels(picture()))


def test_a_pil_image_is_not_changed():
    image = picture()
    decode_image(image).zero_()
    assert torch.equal(pixels(image), pixels(picture()))


def test_jpeg_pixels_are_pillows():
    data = encoded(picture(), "JPEG", quality=80)
    assert torch.equal(decode_image(data), pixels(Image.open(io.BytesIO(data))))


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(orientation, kind):
    """The picture turned away from upright, with the tag that says so, comes out upright."""
    upright = picture()
    away = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(away[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    image = decode_image(encoded(turned, kind, exif=exif, **options))
    assert image.shape == (3, 48, 64)
    assert (image.int() - pixels(upright).int()).abs().max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_gps_tags_change_nothing(kind):
    images = [decode_image(with_exif(6, gps, kind)) for gps in (None, PARIS, LIMA)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_gps_tags_are_not_looked_at(kind, monkeypatch):
    read = []
    get_ifd = Image.Exif.get_ifd
    data = with_exif(6, PARIS, kind)
    monkeypatch.setattr(Image.Exif, "get_ifd", lambda self, tag: read.append(tag) or get_ifd(self, tag))
    decode_image(data)
    assert not read


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\x00\x00", b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"\xff" * 50]
)
def test_damaged_exif_leaves_the_picture_as_it_stands(exif):
    data = encoded(picture(), "JPEG", exif=exif)
    assert torch.equal(decode_image(data), pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_are_none(orientation):
    assert decode_image(with_exif(orientation)).shape == (3, 48, 64)


# --- unusual images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "PA"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    image = picture().convert("P").convert("PA") if mode == "PA" else picture(mode=mode)
    source = image if mode == "PA" else encoded(image)
    assert torch.equal(decode_image(source), pixels(image))


def test_transparency_is_dropped_as_clip_does():
    image = picture(mode="RGBA")
    image.putalpha(0)
    assert torch.equal(decode_image(encoded(image)), pixels(picture()))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = picture(mode="CMYK")
    result = decode_image(encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert (result.int() - pixels(image).int()).abs().max() <= 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_bits(kind):
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    result = decode_image(encoded(Image.fromarray(grey), kind))
    assert torch.equal(result, torch.from_numpy(np.stack([grey >> 8] * 3).astype(np.uint8)))


def test_16_bit_colour_keeps_its_upper_bits():
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert torch.equal(decode_image(data), torch.from_numpy((samples >> 8).astype(np.uint8)).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    first, second = picture().quantize(64).convert("RGB"), picture().rotate(180)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (decode_image(data).int() - pixels(first).int()).abs().max() <= 1


def test_one_pixel():
    image = decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert image.flatten().tolist() == [1, 2, 3]


# --- images that cannot be used ---------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\x00\x00\x00\x00IDAT"


JPEG = encoded(picture(), "JPEG")
UNREADABLE = {
    "empty": (b"", "no image that Pillow can read"),
    "text": (b"%PDF-1.7 or a text", "image of 18 bytes is no image that Pillow can read"),
    "html": (b"<!doctype html><p>404</p>", "no image"),
    "header alone": (JPEG[:20], "image"),
    "bomb": (png_header(30_000, 30_000), "30000 pixels|too large to decode"),
    "large": (png_header(9_500, 9_500), "9500 x 9500 pixels, more than max_pixels=89478485"),
    "float": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), r"32-bit pixels \(mode F\)"),
    "int32": (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), r"32-bit pixels \(mode I\)"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images(name):
    data, message = UNREADABLE[name]
    with pytest.raises(UnreadableImageError, match=message):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.5, 0.99])
def test_truncated_files(kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(UnreadableImageError, match="cannot be decoded: (image file is truncated|could not create decoder)"):
        decode_image(data[: int(part * len(data))])


def test_an_error_names_the_file(tmp_path):
    path = tmp_path / "notes.jpg"
    with pytest.raises(UnreadableImageError, match="notes.jpg does not exist"):
        decode_image(path)
    path.write_text("no picture")
    with pytest.raises(ValueError, match="notes.jpg is no image"):
        decode_image(path)
    with pytest.raises(UnreadableImageError, match="cannot be decoded: .*directory"):
        decode_image(tmp_path)


def test_something_that_is_no_source():
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        decode_image(7)


def test_max_pixels():
    data = encoded(picture(48, 64))
    assert decode_image(data, max_pixels=48 * 64).shape == (3, 48, 64)
    with pytest.raises(UnreadableImageError, match="64 x 48 pixels, more than max_pixels=3071"):
        decode_image(data, max_pixels=48 * 64 - 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_give_a_picture_or_one_kind_of_error(kind, length, changes):
    data = bytearray(with_exif(6, PARIS, kind) if kind in ("JPEG", "PNG", "WEBP", "TIFF") else encoded(picture(), kind))
    for position, value in changes:
        data[position % len(data)] = value
    if length % 3 == 0:
        del data[length % len(data) :]
    try:
        image = decode_image(bytes(data), max_pixels=10**6)
    except UnreadableImageError as error:
        assert str(error)
    else:
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert image.numel() > 0


# --- reduced decoding -------------------------------------------------------------------------------------------------


def test_jpeg_edge_halves_large_files_alone():
    data = encoded(picture(480, 640), "JPEG", quality=95)
    assert decode_image(data, jpeg_edge=240).shape == (3, 240, 320)
    assert decode_image(data, jpeg_edge=241).shape == (3, 480, 640)
    assert decode_image(data, jpeg_edge=60).shape == (3, 60, 80)
    assert decode_image(encoded(picture(480, 640)), jpeg_edge=60).shape == (3, 480, 640)
    reduced = torch.nn.functional.avg_pool2d(decode_image(data).float(), 2)
    difference = (decode_image(data, jpeg_edge=240).float() - reduced).abs()[:2]  # the third channel has edges
    assert difference.mean() < 2


# --- many images ------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_bad_images_fail_alone():
    sources = []
    for i in range(30):
        sources.append(encoded(picture(10 + i, 20), "JPEG"))
        if i % 7 == 3:
            sources.append(b"no image")
    results = list(decode_images(iter(sources), num_threads=4, ahead=5))
    assert len(results) == len(sources)
    for source, result in zip(sources, results, strict=True):
        if source == b"no image":
            assert isinstance(result, UnreadableImageError)
        else:
            assert torch.equal(result, decode_image(source))


def test_sources_may_be_endless():
    taken = []

    def sources():
        for i in itertools.count():
            taken.append(i)
            yield encoded(picture(4, 4))

    results = list(itertools.islice(decode_images(sources(), num_threads=2, ahead=3), 5))
    assert len(results) == 5
    assert len(taken) <= 5 + 3 + 1


def test_stopping_early_leaves_no_thread():
    results = decode_images([encoded(picture())] * 50, num_threads=3)
    next(results)
    results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_images_are_decoded_side_by_side(monkeypatch):
    barrier = threading.Barrier(3, timeout=10)
    decode = image_decoding.decode_image
    monkeypatch.setattr(image_decoding, "decode_image", lambda source, **options: (barrier.wait(), decode(source, **options))[1])
    assert len(list(decode_images([encoded(picture())] * 3, num_threads=3))) == 3


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"ahead": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="=0"):
        decode_images([], **options)


def test_no_images():
    assert list(decode_images([])) == []


# --- simplejpeg -------------------------------------------------------------------------------------------------------


def without_simplejpeg(contents: bytes) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_decoding, "_jpeg_library", lambda: None)
        return decode_image(contents)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (47, 65), (1, 1), (8, 300)])
def test_simplejpeg_gives_pillows_pixels(subsampling, progressive, size):
    pytest.importorskip("simplejpeg")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    contents = encoded(Image.fromarray(noise), "JPEG", quality=85, subsampling=subsampling, progressive=progressive)
    assert image_decoding._jpeg_pixels(contents, 1 << 20) is not None
    assert torch.equal(decode_image(contents), without_simplejpeg(contents))


@pytest.mark.parametrize(
    "contents",
    [encoded(picture(mode="L"), "JPEG"), encoded(picture(mode="CMYK"), "JPEG"), encoded(picture())],
    ids=["grey", "cmyk", "png"],
)
def test_what_needs_pillow_goes_to_pillow(contents):
    assert image_decoding._jpeg_pixels(contents, 1 << 20) is None
    assert torch.equal(decode_image(contents), without_simplejpeg(contents))


@pytest.mark.parametrize("orientation", [None, *range(0, 10)])
def test_simplejpeg_turns_as_pillow_does(orientation):
    pytest.importorskip("simplejpeg")
    contents = with_exif(orientation, {1: "N", 2: (55.0, 42.0, 0.0)})
    assert image_decoding._jpeg_pixels(contents, 1 << 20) is not None
    assert torch.equal(decode_image(contents), without_simplejpeg(contents))


def test_the_header_ends_where_the_picture_begins():
    """Bytes of a picture that look like EXIF are none."""
    contents = encoded(picture(), "JPEG")
    header = image_decoding._jpeg_header(contents)
    assert contents[len(header) : len(header) + 2] == b"\xff\xda"
    assert image_decoding._jpeg_header(contents + b"Exif\0\0") == header
    assert image_decoding._jpeg_header(b"\xff\xd8\xff\xe0\xff\xff") == b"\xff\xd8\xff\xe0\xff\xff"


def test_an_orientation_in_xmp_is_applied():
    """As Pillow reads it, from a file without EXIF."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    contents = encoded(picture(40, 60), "JPEG", xmp=xmp)
    assert decode_image(contents).shape == (3, 60, 40)


def test_a_bomb_is_refused_with_and_without_simplejpeg():
    contents = encoded(picture(48, 64), "JPEG")
    for decode in (decode_image, lambda contents, **options: decode_image(io.BytesIO(contents), **options)):
        with pytest.raises(UnreadableImageError, match="64 x 48 pixels, more than max_pixels=100"):
            decode(contents, max_pixels=100)


def test_threads_without_simplejpeg_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(image_decoding, "_jpeg_library", lambda: None)
    image_decoding.logger.warning_once.cache_clear()
    for _ in range(2):
        list(decode_images([encoded(picture(), "JPEG")], num_threads=2))
    assert caplog.text.count("simplejpeg is not installed") == 1
