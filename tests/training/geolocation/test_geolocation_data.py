import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.geography.coordinates import haversine_km
from geobased.training.geolocation_dataset import GeolocationRows, SkippedImages, StreamedRows, split_by_blocks
from geobased.training.geolocation_sources import (
    HubDataset,
    ImageFolder,
    JoinedSources,
    RecordStream,
    TarShards,
    open_sources,
)
from geobased.training.geolocation_splits import BlockHoldout

places = st.lists(st.tuples(st.floats(-90, 90), st.floats(-180, 180)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(places, st.floats(0.3, 40), st.floats(0, 0.9), st.integers(0, 5))
def test_sides_are_disjoint_and_a_block_is_on_one(points, degrees, fraction, seed):
    latitude, longitude = np.array(points).T
    holdout = BlockHoldout(degrees, fraction, seed)
    blocks, held, training = (f(latitude, longitude) for f in (holdout.blocks, holdout.held_out, holdout.in_training))
    assert not (held & training).any() and (held | training).all()
    assert not set(blocks[held]) & set(blocks[training])
    # a point's side does not depend on the others
    assert [bool(holdout.held_out([y], [x])[0]) for y, x in points] == held.tolist()


def test_blocks_have_about_one_size_and_meet_at_the_dateline():
    holdout = BlockHoldout(degrees=4)
    generator = np.random.default_rng(0)
    latitude = np.degrees(np.arcsin(generator.uniform(-1, 1, 200_000)))
    blocks = holdout.blocks(latitude, generator.uniform(-180, 180, 200_000))
    counts = np.unique(blocks, return_counts=True)[1]
    assert len(counts) == pytest.approx(4 * np.pi / np.radians(4) ** 2, rel=0.02)
    assert np.quantile(counts, 0.98) < 1.6 * np.median(counts)
    assert holdout.blocks([10.0], [180.0]) == holdout.blocks([10.0], [-180.0])
    assert len(np.unique(holdout.blocks([90.0, 90.0, 89.9], [0.0, 120.0, -100.0]))) <= 3


def test_share_of_blocks_and_seeds():
    latitude, longitude = np.meshgrid(np.arange(-88, 90, 1.0), np.arange(-179, 180, 1.0))
    latitude, longitude = latitude.ravel(), longitude.ravel()
    sides = [BlockHoldout(4, 0.2, seed).held_out(latitude, longitude) for seed in range(3)]
    for held in sides:
        assert held.mean() == pytest.approx(0.2, abs=0.03)
    assert 0.5 < np.mean(sides[0] == sides[1]) < 0.8
    assert not BlockHoldout(4, 0.0).held_out(latitude, longitude).any()
    # fixed for good: a model's held-out places must stay the same
    assert BlockHoldout(4, 0.2, 0).held_out([55.7, 37.8, -33.9, 1.3], [13.2, -122.4, 151.2, 103.8]).tolist() == FIXED


FIXED = [True, True, False, True]


def test_margin_keeps_training_away_from_held_out_blocks():
    generator = np.random.default_rng(1)
    latitude = np.degrees(np.arcsin(generator.uniform(-1, 1, 4000)))
    longitude = generator.uniform(-180, 180, 4000)
    holdout = BlockHoldout(8, 0.2, margin_km=100)
    held, training = holdout.held_out(latitude, longitude), holdout.in_training(latitude, longitude)
    distances = haversine_km(
        latitude[training][:, None], longitude[training][:, None], latitude[held][None], longitude[held][None]
    )
    # sixteen directions see all but the tips of corners
    assert distances.min() > 90
    assert training.sum() < (~held).sum() and not (training & held).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"degrees": 0}, "degrees=0"),
        ({"fraction": 1.0}, r"fraction=1\.0"),
        ({"degrees": 1.0, "margin_km": 60.0}, r"margin_km=60\.0"),
    ],
)
def test_holdout_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        BlockHoldout(**values)
    with pytest.raises(ValueError, match="swapped|latitude"):
        BlockHoldout().held_out([120.0], [10.0])


def write_shards(photos, folder, compress=""):
    """Two shards of the photos, with a sample that has no json and one that has no image."""
    with (photos / "photos.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", f"w:{compress}") as archive:
            for row in rows[number::2]:
                facts = {"lat": float(row["latitude"]), "lng": float(row["longitude"]), "country": row["country"]}
                key = f"part.{number}/{row['path'][:2]}"
                members = [("png", (photos / row["path"]).read_bytes()), ("json", json.dumps(facts).encode())]
                if row["path"] in ("46.png", "47.png"):
                    members = members[:1] if row["path"] == "46.png" else members[1:]
                for suffix, content in members:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return sorted(folder.glob("*.tar"))


def test_sources_agree(photos, tmp_path):
    folder = ImageFolder(photos / "photos.csv")
    shards = TarShards(write_shards(photos, tmp_path), progress=False)
    assert len(folder) == 48 and len(shards) == 46
    assert shards.incomplete == ["0.tar/part.0/46: no json", "1.tar/part.1/47: no image"]
    assert shards.columns == {"country": [*folder.columns["country"][0:46:2], *folder.columns["country"][1:46:2]]}
    for row, number in ((0, 0), (3, 6), (23, 1)):
        assert shards.image(row) == (photos / folder.name(number)).read_bytes()
        assert np.array_equal(shards.coordinates[row], folder.coordinates[number])
    assert shards.name(3) == "0.tar/part.0/06.png" and set(folder.columns) == {"country", "town", "elevation", "month"}
    joined = open_sources([photos, *tmp_path.glob("*.tar")], progress=False)
    assert isinstance(joined, JoinedSources) and len(joined) == 94 and joined.name(47) == "47.png"
    assert joined.name(48) == "0.tar/part.0/00.png" and joined.columns["town"][47:49] == ["Suva", None]
    assert isinstance(open_sources([tmp_path], progress=False), TarShards)


def test_datasets_objects(photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = ImageFolder(photos / "photos.csv")
    columns = {
        "image": [str(photos / folder.name(row)) for row in range(48)],
        "latitude": folder.coordinates[:, 0].tolist(),
        "longitude": folder.coordinates[:, 1].tolist(),
        "country": folder.columns["country"],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    source = HubDataset(dataset)
    assert np.array_equal(source.coordinates, folder.coordinates) and source.columns["country"] == columns["country"]
    skipped = SkippedImages()
    rows = GeolocationRows(source, np.arange(48), torch.stack, skipped=skipped)
    plain = GeolocationRows(folder, np.arange(48), torch.stack)
    assert all(torch.equal(rows[i]["pixel_values"], plain[i]["pixel_values"]) for i in range(48))
    assert list(skipped.reasons) == ["row 8"]
    dataset.save_to_disk(tmp_path / "saved")
    assert len(open_sources([tmp_path / "saved"])) == 48
    streamed = list(RecordStream(dataset.to_iterable_dataset()))
    assert [record.columns["country"] for record in streamed] == columns["country"]
    given = list(
        StreamedRows(RecordStream(dataset.to_iterable_dataset()), torch.stack, BlockHoldout(fraction=0.0), held_out=False)
    )
    assert [item["row"] for item in given] == [row for row in range(48) if row != 8]


def test_order_is_a_function_of_seed_and_number(photos):
    source, rows = ImageFolder(photos / "photos.csv"), np.arange(10, 20)
    data = GeolocationRows(source, rows, None, size=30, seed=1)
    order = [data[i]["row"] for i in range(30)]
    again = GeolocationRows(source, rows, None, size=30, seed=1)
    assert [again[i]["row"] for i in reversed(range(30))] == order[::-1]
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert [data[i]["epoch"] for i in (9, 10, 29)] == [0, 1, 2]
    other = GeolocationRows(source, rows, None, size=30, seed=2)
    assert [other[i]["row"] for i in range(10)] != epochs[0]


def test_unreadable_images_are_replaced_and_reported_once(photos, tmp_path):
    skipped = SkippedImages(tmp_path / "skipped.jsonl")
    rows = GeolocationRows(ImageFolder(photos / "photos.csv"), np.array([7, 8, 9]), torch.stack, skipped=skipped)
    assert [rows[i]["row"] for i in range(3)] == [7, 9, 9] and rows[1]["row"] == 9
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1
    assert "no image" in SkippedImages(tmp_path / "skipped.jsonl").all()["08.png"]
    alone = GeolocationRows(ImageFolder(photos / "photos.csv"), np.array([8]), torch.stack)
    with pytest.raises(ValueError, match=r"cannot be read, 08\.png"):
        alone[0]


def test_streams_are_split_and_shuffled(photos):
    with (photos / "photos.csv").open() as file:
        rows = [{**row, "path": str(photos / row["path"])} for row in csv.DictReader(file)]
    holdout = BlockHoldout(4, 0.3, 3)
    sides = [list(StreamedRows(RecordStream(rows), torch.stack, holdout, held_out=held)) for held in (True, False)]
    towns = [{item["columns"]["town"] for item in side} for side in sides]
    assert not towns[0] & towns[1] and sum(map(len, sides)) == 47
    one, two = (
        [item["columns"]["elevation"] + item["columns"]["town"] + str(item["latitude"]) for item in stream]
        for stream in (StreamedRows(RecordStream(rows), torch.stack, holdout, held_out=False, shuffle_buffer=9) for _ in "12")
    )
    assert one == two and len(set(one)) == len(sides[1])
    assert one != [item["columns"]["elevation"] + item["columns"]["town"] + str(item["latitude"]) for item in sides[1]]
    with pytest.raises(ValueError, match="no readable image to train on"):
        next(iter(StreamedRows(RecordStream([]), torch.stack, holdout, held_out=False, epochs=None)))


def test_split_says_what_it_did_and_refuses_nothing(photos):
    source = ImageFolder(photos / "photos.csv")
    split = split_by_blocks(source, BlockHoldout(4, 0.3, 3))
    assert len(split.training) + len(split.evaluation) == 48 and split.facts["evaluation_blocks"] >= 1
    with pytest.raises(ValueError, match="leave no image to hold out"):
        split_by_blocks(source, BlockHoldout(4, 1e-9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,latitude\na.png,1\n", "no column 'longitude'"),
        ("path,latitude,longitude\n", "has no rows"),
        ("path,latitude,longitude\na.png,x,1\n", "places in .*t.csv"),
        ("path,latitude,longitude\na.png,120,10\n", "swapped|latitude"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path / "t.csv")


def test_namibia_and_empty_cells(tmp_path):
    (tmp_path / "t.csv").write_text("file_name,Lat,LON,country_code,note\na.png,-22,17,NA,\n")
    source = ImageFolder(tmp_path / "t.csv")
    assert source.columns == {"country_code": ["NA"], "note": [None]} and source.coordinates.tolist() == [[-22.0, 17.0]]


def test_bad_sources(photos, tmp_path):
    with pytest.raises(ValueError, match="no data"):
        open_sources([])
    with pytest.raises(ValueError, match="no such folder"):
        open_sources([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="0 csv and 0 tar"):
        open_sources([tmp_path])
    with pytest.raises(ValueError, match="no shard"):
        TarShards([tmp_path / "1.tar"], progress=False)
    with pytest.raises(ValueError, match="uncompressed tar"):
        TarShards(write_shards(photos, tmp_path, compress="gz"), progress=False)
    (tmp_path / "half.tar").write_bytes(b"x" * 700)
    with pytest.raises(ValueError, match="cannot be read"):
        TarShards([tmp_path / "half.tar"], progress=False)
