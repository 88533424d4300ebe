import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from geobased.geography.geocell_collection import Geocells
from geobased.modeling_streetclip.captions import make_captions
from geobased.training.earth_baselines import LabelledCrops, NearestPixels, chance, evaluate_baselines
from geobased.training.earth_crops import SATELLITE, EarthCrops, EarthCropSource
from geobased.training.earth_labels import ElevationRaster, KoeppenRaster
from geobased.training.earth_projection import EarthImage, crop_coordinates, crop_rays
from geobased.training.earth_sampling import CropSettings, EarthSampler, uniform
from geobased.training.geolocation_dataset import GeolocationRows, split_by_blocks
from geobased.training.geolocation_splits import BlockHoldout

# land: everywhere east of Greenwich, and north of the equator west of it; cells: four quarters of 90 degrees, and nothing else
QUARTERS = {"NL": (-90, 0, 0, 90), "JP": (0, 0, 90, 90), "NA": (0, -90, 90, 0), "AU": (90, -90, 180, 0)}


@pytest.fixture(scope="module")
def world():
    """(climate, elevation, cells): tropical west of 90 degrees east, desert east of it; 10 m a degree of latitude."""
    import shapely

    zones = np.repeat(np.array([[0, 0, 0, 1], [2, 2, 0, 1]], np.uint8), 2, axis=0)
    climate = KoeppenRaster(zones, ["Af", "BWh", "Ocean"])
    latitudes = np.arange(-90, 91, 10.0)
    elevation = ElevationRaster(np.repeat(latitudes[:, None] * 10, 36, axis=1), latitudes, np.arange(-180, 180, 10.0))
    boxes = np.array(list(QUARTERS.values()), dtype=float)
    cells = Geocells(
        polygons=shapely.box(*boxes.T),
        country_codes=np.array(list(QUARTERS)),
        countries=np.array(["Netherlands", "Japan", "Namibia", "Australia"]),
        regions=np.array(["North", "Northeast", "South", "Southeast"]),
        sizes=np.full(4, 10),
        centroids=np.stack([boxes[:, [1, 3]].mean(1), boxes[:, [0, 2]].mean(1)], axis=1),
        radii_km=np.full(4, 3000.0),
    )
    return climate, elevation, cells


@pytest.fixture(scope="module")
def image():
    height = 90
    latitude, longitude = (np.arange(n) for n in (height, 2 * height))
    lat, lng = np.meshgrid(90 - (latitude + 0.5) * 2, (longitude + 0.5) * 2 - 180, indexing="ij")
    phi, lam = np.radians(lat), np.radians(lng)
    vectors = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)
    return EarthImage(np.rint((vectors + 1) * 127.5).astype(np.uint8))


def sampler(world, **options):
    return EarthSampler(*world, **options)


def test_draws_are_uniform_and_functions_of_seed_number_and_stream():
    draws = uniform(3, np.arange(20_000)[:, None], np.arange(2))
    assert draws.shape == (20_000, 2) and draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=0.003)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:, 0], uniform(4, np.arange(20_000), 0))[0, 1]) < 0.03
    # the same on every machine
    np.testing.assert_allclose(
        uniform(0, np.arange(3), 0), [0.6524484863740322, 0.0010292855246877286, 0.6601999241867332], rtol=0, atol=0
    )


def test_places_do_not_depend_on_their_batch(world):
    draw = sampler(world)
    together = draw.places(np.arange(50))
    for numbers in ([7], [40, 3], np.arange(49, -1, -1)):
        part = draw.places(np.array(numbers))
        for name, values in vars(together).items():
            np.testing.assert_array_equal(getattr(part, name), values[numbers], err_msg=name)
    other = sampler(world, settings=CropSettings(seed=1)).places(np.arange(50))
    assert (other.latitude != together.latitude).all()


def test_places_are_land_in_cells_and_their_facts_are_true(world):
    climate, elevation, cells = world
    places = sampler(world, settings=CropSettings(degrees=(3, 12), rotation=30, min_land=0.6)).places(np.arange(600))
    assert climate.is_land(places.latitude, places.longitude).all() and cells.covers(places.latitude, places.longitude).all()
    np.testing.assert_array_equal(places.geocell, cells.locate(places.latitude, places.longitude))
    np.testing.assert_allclose(places.elevation, places.latitude * 10, atol=1e-3)
    assert (places.climate == (places.longitude >= 90)).all()
    assert places.latitude.min() > -60 and places.latitude.max() < 84
    assert places.degrees.min() >= 3 and places.degrees.max() <= 12 and np.abs(places.rotation).max() <= 30
    # evenly by logarithm
    assert np.median(places.degrees) == pytest.approx(6, abs=0.5)
    lat, lng = crop_coordinates(places.latitude, places.longitude, places.degrees, places.rotation, 8)
    np.testing.assert_allclose(places.land, climate.is_land(lat, lng).mean((1, 2)))
    assert places.land.min() >= 0.6


def test_centres_are_even_by_area(world):
    settings = CropSettings(latitudes=(-90, 90), min_land=0)
    places = sampler(world, settings=settings, side="all").places(np.arange(8000))
    # four quarters, of which two thirds reach to 30 and 42 degrees
    np.testing.assert_allclose(np.bincount(places.geocell) / 8000, 0.25, atol=0.02)
    assert (np.abs(places.latitude) < 30).mean() == pytest.approx(0.5, abs=0.02)


def test_sides_follow_the_blocks(world):
    holdout = BlockHoldout(degrees=10, fraction=0.3, margin_km=100)
    training, evaluation = (
        sampler(world, holdout=holdout, side=side).places(np.arange(400)) for side in ("training", "evaluation")
    )
    assert holdout.in_training(training.latitude, training.longitude).all()
    assert holdout.held_out(evaluation.latitude, evaluation.longitude).all()
    both = sampler(world, holdout=holdout, side="all").places(np.arange(400))
    assert holdout.held_out(both.latitude, both.longitude).mean() == pytest.approx(0.3, abs=0.12)


def test_disjoint_training_crops_show_no_held_out_ground(world):
    holdout = BlockHoldout(degrees=10, fraction=0.2)
    plain, disjoint = (sampler(world, holdout=holdout, disjoint=d).places(np.arange(200)) for d in (False, True))

    def shows_held_out(places):
        lat, lng = crop_coordinates(places.latitude, places.longitude, places.degrees, places.rotation, 8)
        return holdout.held_out(lat, lng).any(axis=(1, 2))

    assert shows_held_out(plain).any() and not shows_held_out(disjoint).any()


@pytest.mark.parametrize(
    "options",
    [
        {"degrees": (0, 4)},
        {"degrees": (4, 2)},
        {"degrees": (4, 200)},
        {"rotation": 181},
        {"latitudes": (10, 10)},
        {"min_land": 2},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CropSettings(**options)


def test_samplers_without_places_are_refused(world, monkeypatch):
    with pytest.raises(ValueError, match="choose training"):
        sampler(world, side="test")
    with pytest.raises(ValueError, match="hold out some blocks"):
        sampler(world, side="evaluation", holdout=BlockHoldout(fraction=0))
    with pytest.raises(ValueError, match="from 0 on"):
        sampler(world).places(np.array([-1]))
    monkeypatch.setattr("geobased.training.earth_sampling.MAX_ROUNDS", 3)
    import shapely

    climate, elevation, cells = world
    nowhere = Geocells(
        np.array([shapely.box(-60, -50, -50, -40)]),
        *(np.array([text]) for text in ("AR", "Argentina", "Sea")),
        np.array([1]),
        np.array([[-45.0, -55.0]]),
        np.array([9.0]),
    )
    with pytest.raises(ValueError, match="5 of 5 crops found no place"):
        EarthSampler(climate, elevation, nowhere).places(np.arange(5))


def test_a_batch_holds_pixels_and_labels(world, image):
    crops = EarthCrops(image, sampler(world), size=16, length=40)
    batch = crops.batch(np.arange(40))
    places = batch["places"]
    rays = crop_rays(places.latitude, places.longitude, places.degrees, places.rotation, 16)
    expected = torch.nn.functional.normalize(rays, dim=-1).permute(0, 3, 1, 2)
    assert (batch["pixel_values"] * 2 - 1 - expected).abs().max() < 0.01
    assert batch["coordinates"].dtype == torch.float64 and batch["coordinates"].numpy().tolist() == places.coordinates.tolist()
    assert batch["labels"].tolist() == places.geocell.tolist()
    assert batch["head_labels"]["elevation"].shape == (40, 1) and batch["head_labels"]["climate"].dtype == torch.int64
    parts = list(crops.batches(16))
    assert [len(part["labels"]) for part in parts] == [16, 16, 8]
    torch.testing.assert_close(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"], atol=1e-6, rtol=0)
    following = next(crops.batches(4, first=40))
    assert following["places"].numbers.tolist() == [40, 41, 42, 43]
    heads = {head["name"]: head for head in crops.heads()}
    assert heads["climate"]["labels"] == ["Af", "BWh"]


def test_a_data_loader_gives_the_same_crops(world, image):
    crops = EarthCrops(image, sampler(world), size=8, length=10)
    batch = crops.batch(np.arange(10))
    loaded = list(DataLoader(crops, batch_size=4, num_workers=0))
    torch.testing.assert_close(torch.cat([part["pixel_values"] for part in loaded]), batch["pixel_values"], atol=1e-6, rtol=0)
    assert torch.cat([part["geocell"] for part in loaded]).tolist() == batch["labels"].tolist()
    assert len(list(crops)) == len(crops) == 10
    assert crops[3]["country"] == loaded[0]["country"][3]
    with pytest.raises(IndexError, match="outside 0 to 9"):
        crops[10]


def test_captions_of_crops_are_true(world, image):
    crops = EarthCrops(image, sampler(world), size=8)
    places = crops.places(np.arange(64))
    columns, described = crops.columns(places), crops.describe(places)
    for row, place in enumerate(described):
        code = next(c for c, (west, south, east, north) in QUARTERS.items() if inside(places, row, west, south, east, north))
        assert columns["country_code"][row] == code and place.region is None and columns["region"][row] == ""
        assert place.climate == columns["climate"][row] == ("BWh" if places.longitude[row] >= 90 else "Af")
        assert place.driving_side == ("right" if code == "NL" else "left")
        assert place.heading == columns["heading"][row] == pytest.approx(places.rotation[row] % 360)
    assert set(columns["continent"]) == {"Europe", "Asia", "Africa", "Oceania"}
    captions = make_captions(described, SATELLITE)
    assert all(c.startswith("A satellite photo") or "climate" in c for c in captions)
    assert any("the Netherlands" in c for c in captions) and not any("facing" in c for c in captions)


def inside(places, row, west, south, east, north):
    return south <= places.latitude[row] <= north and west <= places.longitude[row] <= east


def test_regions_are_those_of_the_centres(world, image):
    crops = EarthCrops(image, sampler(world), units=lambda lat, lng: np.where(lat > 0, "Upper", ""))
    places = crops.places(np.arange(30))
    described = crops.describe(places)
    assert [place.region for place in described] == ["Upper" if lat > 0 else None for lat in places.latitude]
    assert "in the region of Upper in" in " ".join(make_captions(described))


def test_crops_are_a_source_for_the_trainings(world, image):
    source = EarthCropSource(EarthCrops(image, sampler(world, side="all"), size=8, length=60), progress=False)
    assert len(source) == 60 and source.coordinates.shape == (60, 2) and len(source.columns["climate"]) == 60
    split = split_by_blocks(source, BlockHoldout(degrees=10, fraction=0.3))
    assert len(split.training) + len(split.evaluation) == 60
    rows = GeolocationRows(source, split.evaluation, lambda images: torch.stack(images))
    row = int(split.evaluation[0])
    expected = (EarthCrops(image, sampler(world, side="all"), size=8).batch([row])["pixel_values"][0] * 255).round().byte()
    assert torch.equal(rows[0]["pixel_values"], expected)
    with pytest.raises(ValueError, match="use 'all'"):
        EarthCropSource(EarthCrops(image, sampler(world)), progress=False)


def test_crops_that_are_none_are_refused(world, image):
    with pytest.raises(ValueError, match="size=0"):
        EarthCrops(image, sampler(world), size=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(EarthCrops(image, sampler(world)).batches(0))
    climate, elevation, cells = world
    from dataclasses import replace

    unknown = replace(cells, country_codes=np.array(["NL", "JP", "NA", "ZZ"]))
    with pytest.raises(ValueError, match="ZZ"):
        EarthCrops(image, EarthSampler(climate, elevation, unknown))


def labelled(crops, numbers):
    batch = crops.batch(numbers)
    return LabelledCrops(batch["pixel_values"], batch["places"].coordinates, crops.country_codes(batch["places"]))


def test_baselines_are_measured(world, image):
    crops = EarthCrops(image, sampler(world, settings=CropSettings(rotation=0)), size=16)
    train, test = labelled(crops, np.arange(800)), labelled(crops, np.arange(800, 1000))
    results = evaluate_baselines(train, test, side=4, bootstrap=20)
    assert list(results) == ["chance", "mean", "nearest"]
    # the colours of this Earth tell the place
    assert results["nearest"].metrics["median_km"].value < 500 < results["mean"].metrics["median_km"].value
    assert results["mean"].metrics["median_km"].value < results["chance"].metrics["median_km"].value
    assert results["nearest"].metrics["country_accuracy"].value > 90 > results["chance"].metrics["country_accuracy"].value
    counts = np.unique(test.countries, return_counts=True)
    most = max(set(train.countries), key=list(train.countries).count)
    share = dict(zip(*counts, strict=True))[most] / 200
    assert results["mean"].metrics["country_accuracy"].value == pytest.approx(100 * share)
    assert len(np.unique(results["mean"].predictions, axis=0)) == 1


def test_nearest_pixels_finds_the_crop_itself_and_by_the_definition(world, image):
    pixels = EarthCrops(image, sampler(world), size=12).batch(np.arange(30))["pixel_values"]
    nearest = NearestPixels(pixels, side=3)
    assert nearest(pixels).tolist() == list(range(30))
    noisy = pixels + 0.05 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    small = [torch.nn.functional.avg_pool2d(p, 4).flatten(1) for p in (noisy, pixels)]
    assert nearest(noisy).tolist() == torch.cdist(*small).argmin(1).tolist()
    assert nearest(pixels[:0]).tolist() == []


def test_chance_draws_training_places():
    rows = chance(np.zeros((7, 2)), 1000, seed=1)
    assert sorted(set(rows.tolist())) == list(range(7)) and rows.tolist() == chance(np.zeros((7, 2)), 1000, seed=1).tolist()
    with pytest.raises(ValueError, match="no training places"):
        chance(np.zeros((0, 2)), 3)


def test_crops_without_truths_are_refused():
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="2 crops, but coordinates of shape"):
        LabelledCrops(pixels, np.zeros((3, 2)), ["NL", "NL"])
    with pytest.raises(ValueError, match="n > 0"):
        LabelledCrops(pixels[:0], np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match="swapped"):
        LabelledCrops(pixels, np.array([[100.0, 10.0], [0.0, 0.0]]), ["NL", "NL"])
    with pytest.raises(ValueError, match="side=16"):
        NearestPixels(pixels)
