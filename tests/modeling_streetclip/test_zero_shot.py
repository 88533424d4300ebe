"""Hierarchical search against brute force over all paths."""

import collections
import math
from dataclasses import dataclass

import pytest
import torch

from geobased.modeling_streetclip import StreetCLIPModel
from geobased.modeling_streetclip.label_embeddings import LabelEmbedder
from geobased.modeling_streetclip.zero_shot import (
    STREETCLIP_LEVELS,
    HierarchicalZeroShot,
    SearchLevel,
    ZeroShotResult,
)


@dataclass(frozen=True)
class MadeUpPlace:
    id: int
    name: str
    level: str
    latitude: float
    longitude: float
    parent: int | None
    population: int


class MadeUpWorld:
    """Countries, some with regions; cities lie in regions or, where a country has none, in the country. One has nothing."""

    def __init__(self, countries: int = 5, regions: int = 3, cities: int = 4):
        self.places: list[MadeUpPlace] = []
        self.asked: list[tuple] = []
        for c in range(countries):
            country = self.add(f"Land {c}", "country", 10.0 * c, -20.0 * c, None)
            if c == countries - 1:
                continue  # no regions, no cities
            if c == countries - 2:
                parents = [country]
            else:
                parents = [self.add(f"Region {c}{r}", "region", 10.0 * c + r, -20.0 * c, country) for r in range(regions - c % 2)]
            for parent in parents:
                for t in range(cities):
                    place = self.places[parent]
                    self.add(f"Town {parent}-{t}", "city", place.latitude + 0.1 * t, place.longitude + 0.2 * t, parent)

    def add(self, name: str, level: str, latitude: float, longitude: float, parent: int | None) -> int:
        number = len(self.places)
        self.places.append(MadeUpPlace(number, name, level, latitude, longitude, parent, (number * 7919) % 1000))
        return number

    def inside(self, place: MadeUpPlace, within: int | None) -> bool:
        if within is None or place.parent == within:
            return True
        return place.parent is not None and self.inside(self.places[place.parent], within)

    def candidates(self, level, *, within=None, k=None) -> list[MadeUpPlace]:
        self.asked.append((level, within, k))
        places = [p for p in self.places if p.level == level and self.inside(p, None if within is None else within.id)]
        return sorted(places, key=lambda p: -p.population)[:k]


COUNTRY = SearchLevel("country", ("A Street View photo in {country}.",))
REGION = SearchLevel("region", ("A photo in {region}.", "{name}, {country}"))
CITY = SearchLevel("city", ("A Street View photo from {city} in {region} in {country}.",), k=2)
LEVELS = (COUNTRY, REGION, CITY)
CITY_IN_COUNTRY = SearchLevel("city", ("{city}",), k=3)


@pytest.fixture(scope="module")
def embedder(checkpoint, tokenizer) -> LabelEmbedder:
    return LabelEmbedder(StreetCLIPModel.from_pretrained(checkpoint), tokenizer, cache_dir=None)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(5))


def brute_force(world, embedder, levels, image) -> dict[tuple[int, ...], float]:
    """Probability of every path, by recursion: softmax within the parent, times the parent's."""
    scale = embedder.model.logit_scale.exp().item()
    image = image / image.norm()

    def descend(path, probability, depth):
        if depth == len(levels):
            return {tuple(p.id for p in path): probability}
        level = levels[depth]
        places = world.candidates(level.name, within=path[-1] if path else None, k=level.k) or [path[-1]]
        logits = []
        for place in places:
            names = {lv.name: p.name for lv, p in zip(levels, [*path, place], strict=False)}
            texts = [prompt.format(name=place.name, **names) for prompt in level.prompts]
            vectors = [embedder.embed_sets([[text]])[0][0] for text in texts]
            mean = torch.stack(vectors).mean(dim=0)
            logits.append(scale * float(mean / mean.norm() @ image))
        weights = [math.exp(x - max(logits)) for x in logits]
        found = {}
        for place, weight in zip(places, weights, strict=True):
            found |= descend([*path, place], probability * weight / sum(weights), depth + 1)
        return found

    return descend([], 1.0, 0)


def ids(path) -> tuple[int, ...]:
    return tuple(place.id for place in path)


def probabilities(result: ZeroShotResult, image: int) -> dict[tuple[int, ...], float]:
    values = result.log_probabilities[image].exp().tolist()
    return {ids(path): p for path, p in zip(result.paths, values, strict=True) if p > 0}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_joint_search_is_brute_force(embedder, images, depth):
    world = MadeUpWorld()
    result = HierarchicalZeroShot(world, embedder, LEVELS[:depth])(images)
    for i, image in enumerate(images):
        expected = brute_force(world, embedder, LEVELS[:depth], image)
        assert probabilities(result, i) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert sum(expected.values()) == pytest.approx(1.0)
        best = max(expected, key=expected.get)
        assert ids(result.top(1)[i][0].path) == best


def greedy(paths: dict[tuple[int, ...], float], depth: int) -> dict[tuple[int, ...], float]:
    """Of all paths those inside the best place of each level but the last."""
    for level in range(1, depth):
        sums = collections.Counter()
        for path, probability in paths.items():
            sums[path[:level]] += probability
        best = max(sums, key=sums.get)
        paths = {path: p for path, p in paths.items() if path[:level] == best}
    return paths


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_search_is_the_best_child_of_the_best(embedder, images, depth):
    world = MadeUpWorld()
    result = HierarchicalZeroShot(world, embedder, LEVELS[:depth], beam=1)(images)
    for i, image in enumerate(images):
        expected = greedy(brute_force(world, embedder, LEVELS[:depth], image), depth)
        assert probabilities(result, i) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert {ids(p.path) for p in result.top(1000)[i]} == set(expected)


def test_greedy_and_joint_search_can_differ(embedder):
    """The best city of all may lie in the second country."""
    search = {beam: HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS, beam=beam) for beam in (1, None)}
    images = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    best = {beam: [ids(row[0].path) for row in s(images).top(1)] for beam, s in search.items()}
    different = sum(a != b for a, b in zip(best[1], best[None], strict=True))
    assert 0 < different < 300


def test_a_wide_beam_is_joint_search(embedder, images):
    world = MadeUpWorld()
    joint, wide = (HierarchicalZeroShot(world, embedder, LEVELS, beam=beam)(images) for beam in (None, 1000))
    assert [ids(p) for p in joint.paths] == [ids(p) for p in wide.paths]
    torch.testing.assert_close(joint.log_probabilities, wide.log_probabilities, rtol=1e-4, atol=1e-4)


def test_a_beam_keeps_the_best_places(embedder, images):
    world = MadeUpWorld()
    result = HierarchicalZeroShot(world, embedder, (COUNTRY, CITY_IN_COUNTRY), beam=2)(images)
    for i, image in enumerate(images):
        countries = brute_force(world, embedder, (COUNTRY,), image)
        best = sorted(countries, key=countries.get)[-2:]
        reached = probabilities(result, i)
        assert {path[:1] for path in reached} == set(best)
        everything = brute_force(world, embedder, (COUNTRY, CITY_IN_COUNTRY), image)
        assert reached == pytest.approx({p: everything[p] for p in everything if p[:1] in best}, rel=1e-3, abs=1e-6)


def test_images_do_not_depend_on_each_other(embedder, images):
    for beam in (None, 1, 2):
        search = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS, beam=beam)
        together = search(images).top(3)
        for i, image in enumerate(images):
            alone = search(image[None]).top(3)[0]
            assert [ids(p.path) for p in alone] == [ids(p.path) for p in together[i]]
            assert [p.score for p in alone] == pytest.approx([p.score for p in together[i]], rel=1e-3)


def test_the_length_of_an_embedding_does_not_matter(embedder, images):
    search = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS)
    torch.testing.assert_close(search(images).log_probabilities, search(17 * images).log_probabilities, rtol=1e-4, atol=1e-4)


def test_classification_of_countries_is_that_of_clip(embedder, tokenizer, pixel_values):
    """One level is transformers' zero-shot classification."""
    world = MadeUpWorld()
    names = [place.name for place in world.candidates("country")]
    texts = tokenizer([f"A Street View photo in {name}." for name in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = embedder.model(pixel_values=pixel_values, **texts).logits_per_image.softmax(dim=1)
        result = HierarchicalZeroShot(world, embedder, [COUNTRY])(embedder.model.get_image_embeddings(pixel_values).projected)
    assert [path[0].name for path in result.paths] == names
    torch.testing.assert_close(result.log_probabilities.exp(), expected, rtol=1e-3, atol=1e-5)


# --- places and prompts -----------------------------------------------------------------------------------------------


def test_places_without_candidates_stand_for_themselves(embedder, images):
    world = MadeUpWorld()
    by_name = {path[-1].name: [p.name for p in path] for path in HierarchicalZeroShot(world, embedder, LEVELS).leaves()}
    assert by_name["Land 4"] == ["Land 4"] * 3  # neither regions nor cities
    assert {tuple(names[:2]) for names in by_name.values() if names[0] == "Land 3"} == {("Land 3", "Land 3")}
    assert [names for names in by_name.values() if names[0] == "Land 3" and names[2].startswith("Town")]


def test_k_and_within_reach_the_source(embedder, images):
    world = MadeUpWorld()
    leaves = HierarchicalZeroShot(world, embedder, LEVELS).leaves()
    asked = set(world.asked)
    assert ("country", None, None) in asked
    assert all(within is not None and k == 2 for level, within, k in asked if level == "city")
    assert max(collections.Counter(path[1].id for path in leaves).values()) == 2


def test_the_source_is_asked_once(embedder, images):
    world = MadeUpWorld()
    search = HierarchicalZeroShot(world, embedder, LEVELS)
    search(images)
    asked = len(world.asked)
    search(images)
    search.leaves()
    assert len(world.asked) == asked


def prompted(world, levels, monkeypatch, embedder) -> list[str]:
    texts: list[str] = []
    embed = embedder.embed_sets
    monkeypatch.setattr(embedder, "embed_sets", lambda sets: texts.extend(t for s in sets for t in s) or embed(sets))
    HierarchicalZeroShot(world, embedder, levels)(torch.ones(1, 16))
    return texts


def test_published_prompts(embedder, monkeypatch):
    world = MadeUpWorld(countries=0)
    country = world.add("Netherlands", "country", 52.0, 5.0, None)
    world.add("Utrecht", "city", 52.1, 5.1, country)
    texts = prompted(world, STREETCLIP_LEVELS, monkeypatch, embedder)
    assert texts == ["A Street View photo in the Netherlands.", "A Street View photo from Utrecht."]


def test_prompts_see_all_levels_above(embedder, monkeypatch):
    world = MadeUpWorld(countries=0)
    country = world.add("Netherlands", "country", 52.0, 5.0, None)
    world.add("Utrecht", "city", 52.1, 5.1, country)
    levels = [SearchLevel("country", ("{name}", "in {country}")), SearchLevel("city", ("{name}, {country}", "{city}"), k=1)]
    texts = prompted(world, levels, monkeypatch, embedder)
    assert texts == ["Netherlands", "in the Netherlands", "Utrecht, the Netherlands", "Utrecht"]


def test_embeddings_are_computed_once_and_read_from_disk(checkpoint, tokenizer, images, tmp_path, monkeypatch):
    model = StreetCLIPModel.from_pretrained(checkpoint)
    expected = HierarchicalZeroShot(MadeUpWorld(), LabelEmbedder(model, tokenizer, cache_dir=tmp_path), LEVELS)(images)
    assert len(list(tmp_path.iterdir())) == 3  # a file for each level

    def fail(*args, **kwargs):
        raise AssertionError("labels are embedded again")

    monkeypatch.setattr(model, "get_text_features", fail)
    search = HierarchicalZeroShot(MadeUpWorld(), LabelEmbedder(model, tokenizer, cache_dir=tmp_path), LEVELS)
    for _ in range(2):
        assert torch.equal(search(images).log_probabilities, expected.log_probabilities)


def test_greedy_search_embeds_what_it_reaches_alone(checkpoint, tokenizer, images, tmp_path):
    model = StreetCLIPModel.from_pretrained(checkpoint)
    embedder = LabelEmbedder(model, tokenizer, cache_dir=tmp_path)
    search = HierarchicalZeroShot(MadeUpWorld(), embedder, (COUNTRY, CITY_IN_COUNTRY), beam=1)
    best = {row[0].path[0].id for row in search(images).top(1)}
    assert len(list(tmp_path.iterdir())) == 1 + len(best)
    assert len(best) < 5


# --- results ----------------------------------------------------------------------------------------------------------


def test_top(embedder, images):
    result = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS)(images)
    for row, top in zip(result.log_probabilities.exp(), result.top(4), strict=True):
        assert [p.score for p in top] == pytest.approx(row.sort(descending=True).values[:4].tolist())
        assert all((p.latitude, p.longitude) == (p.path[-1].latitude, p.path[-1].longitude) for p in top)
    assert [len(top) for top in result.top(10**6)] == [len(result.paths)] * 7


def test_probabilities_of_countries(embedder, images):
    for beam in (None, 2):
        search = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS, beam=beam)
        countries = search(images).at_level(0)
        alone = HierarchicalZeroShot(MadeUpWorld(), embedder, [COUNTRY])(images)
        for i in range(len(images)):
            # greedy search passes over a part of what lies in a country
            bounds = probabilities(alone, i)
            for path, probability in probabilities(countries, i).items():
                if beam is None:
                    assert probability == pytest.approx(bounds[path], rel=1e-3, abs=1e-6)
                else:
                    assert probability <= bounds[path] * 1.001
    assert search(images).at_level(5).paths == search(images).paths


def test_very_unlikely_places_are_no_nan(embedder, images):
    model = embedder.model
    before = model.logit_scale.data.clone()
    model.logit_scale.data.fill_(10.0)
    try:
        result = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS, beam=2)(images)
        assert not result.log_probabilities.isnan().any()
        assert not result.at_level(0).log_probabilities.isnan().any()
        assert all(row[0].score > 0.2 for row in result.top(1))
    finally:
        model.logit_scale.data.copy_(before)


# --- ceiling ----------------------------------------------------------------------------------------------------------


def test_ceiling_of_the_leaves(embedder):
    search = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS)
    leaves = [path[-1] for path in search.leaves()]
    target = leaves[3]
    ceiling = search.ceiling([target.latitude, 0.0], [target.longitude, 179.0])
    assert ceiling.distance_km[0] == 0
    assert (leaves[ceiling.nearest[0]].latitude, leaves[ceiling.nearest[0]].longitude) == (target.latitude, target.longitude)
    assert ceiling.distance_km[1] > 1000


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "must be at least one"),
        ([COUNTRY, COUNTRY], "each only once"),
        ([SearchLevel("country", ("in {city}",))], r"has the field \{city\}"),
        ([COUNTRY, SearchLevel("city", ("in {country}",))], "does not name the candidate"),
        ([SearchLevel("country", ("in {}",))], r"has the field \{\}"),
    ],
)
def test_bad_levels(embedder, levels, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalZeroShot(MadeUpWorld(), embedder, levels)


def test_bad_arguments(embedder, images):
    with pytest.raises(ValueError, match="k=0 of level 'city'"):
        SearchLevel("city", ("{city}",), k=0)
    with pytest.raises(ValueError, match="must be a tuple"):
        SearchLevel("city", "{city}")
    with pytest.raises(ValueError, match="must be a tuple"):
        SearchLevel("city", ())
    with pytest.raises(ValueError, match="beam=0"):
        HierarchicalZeroShot(MadeUpWorld(), embedder, beam=0)
    search = HierarchicalZeroShot(MadeUpWorld(), embedder, LEVELS)
    with pytest.raises(ValueError, match="k=0"):
        search(images).top(0)
    with pytest.raises(ValueError, match=r"not \(16,\)"):
        search(images[0])
    with pytest.raises(ValueError, match=r"not \(0, 16\)"):
        search(images[:0])
    images[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"images \[3\] are not finite"):
        search(images)


def test_a_source_without_candidates(embedder, images):
    with pytest.raises(ValueError, match="no candidates of level 'planet'"):
        HierarchicalZeroShot(MadeUpWorld(), embedder, [SearchLevel("planet", ("{planet}",))])(images)
