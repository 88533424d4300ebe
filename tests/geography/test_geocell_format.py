import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.geocell_format import (
    MAGIC,
    decode_integers,
    decode_polygons,
    encode_integers,
    encode_polygons,
    pack,
    unpack,
)

shapely = pytest.importorskip("shapely")


@settings(deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62), max_size=50))
def test_integers_round_trip(values):
    assert decode_integers(encode_integers(np.array(values, dtype=np.int64)), len(values)).tolist() == values


def test_small_integers_take_a_byte():
    assert encode_integers(np.array([0, -1, 1, 63, -64])) == bytes([0, 1, 2, 126, 127])
    assert len(encode_integers(np.array([64, -65]))) == 4


def test_damaged_integers():
    data = encode_integers(np.array([1, 300]))
    with pytest.raises(ValueError, match="holds 2 integers instead of 3"):
        decode_integers(data, 3)
    with pytest.raises(ValueError, match="damaged"):
        decode_integers(data[:-1], 2)


def test_polygons_round_trip():
    ring = shapely.box(0, 0, 4, 4).difference(shapely.box(1, 1, 2, 2))
    polygons = np.array(
        [
            shapely.Polygon([(0.1, 0.2), (1.5, 0.25), (-179.99999, 89.99999)]),
            ring,
            shapely.MultiPolygon([shapely.box(179, -17, 180, -16), ring, shapely.box(-180, -17, -179.5, -16)]),
        ],
        dtype=object,
    )
    decoded = decode_polygons(encode_polygons(polygons, 5), 5)
    assert [shape.geom_type for shape in decoded] == ["Polygon", "Polygon", "MultiPolygon"]
    assert shapely.equals_exact(decoded, polygons, tolerance=0).all()


def test_files_tell_what_is_wrong_with_them():
    data = pack({"sizes": np.arange(100)}, {"decimals": 5, "text": "Réunion"})
    sections, header = unpack(data)
    assert sections["sizes"].tolist() == list(range(100)) and header["text"] == "Réunion"
    assert data.startswith(MAGIC) and data == pack({"sizes": np.arange(100)}, {"text": "Réunion", "decimals": 5})
    with pytest.raises(ValueError, match="x.bin is no file of geocells"):
        unpack(b"PK\x03\x04", "x.bin")
    with pytest.raises(ValueError, match="ends inside its header"):
        unpack(data[:30])
    with pytest.raises(ValueError, match="checksum"):
        unpack(data[:-1])
    with pytest.raises(ValueError, match="header is no JSON"):
        unpack(data[:12] + b"?" + data[13:])
