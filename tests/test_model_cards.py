"""Templates of model cards: filled from configurations and JSON that the package writes, with no gap left unsaid."""

import json
import re
from pathlib import Path

import jinja2
import pytest
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import meta

import geobased
from geobased.model_cards import card_from_template, template_path

DATA = ModelCardData(license="apache-2.0", library_name="geobased", tags=["based"])
NAMES = ("based", "geolocalization", "reward", "superhf")


def shipped_json(checkpoint: str, name: str) -> dict:
    return json.loads(Path(geobased.checkpoint_path(checkpoint), name).read_text(encoding="utf-8"))


@pytest.fixture
def based():
    config = shipped_json("based-mini", "config.json")
    return {
        "model_name": "mine",
        "repo_id": "me/mine",
        "config": config,
        "parameters": 6_700_288,
        "state_bytes": 466_496,
        "dtype": "bfloat16",
    }


@pytest.fixture
def evaluation():
    held_out = shipped_json("earthclip-mini", "evaluation.json")["sets"]["held_out"]
    parts = {name: held_out[name] for name in ("answered", "calibration")}
    return {"count": held_out["crops"], "metrics": held_out["pigeon"], **parts}


def rows(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))


def test_card_of_a_language_model_says_what_config_and_log_say(based):
    log = shipped_json("based-mini", "training_log.json")
    recall = {"accuracy": 0.286, "low": 0.274, "high": 0.299, "num_questions": 8868}
    recall = {"recall": {"num_documents": 595, "overall": recall, "by_distance": {"0-64": recall}, "closed_book": None}}
    metrics = {"bits_per_byte": {"value": 1.7581, "low": 1.75, "high": 1.77}, "word_perplexity": 571.15}
    card = card_from_template("based", DATA, **based, training=log, metrics=metrics, recall=recall, limits=["English only."])
    assert card.data.license == "apache-2.0" and card.data.tags == ["based"]
    assert "6,700,288 parameters: 8 layers (4 conv, 2 linear attention, 2 sliding attention)" in card.text
    assert "1,500 steps, 98,304,000 tokens, 246 s on NVIDIA H200; seed 0" in card.text
    found = rows(card)
    assert found["bits per byte"] == "1.758 (1.75–1.77)" and found["word perplexity"] == "571.1"
    assert "| all | 28.6 (27.4–29.9) | 8,868 |" in card.text and "- English only." in card.text
    assert "Data and intended use of the weights are not recorded here" in card.text


def test_card_without_measurements_says_nothing_of_them(based):
    text = card_from_template("based", DATA, **based).text
    assert "## Measured" not in text and "trust_remote_code" not in text and "are not recorded here" in text
    text = card_from_template("geolocalization", DATA, model_name="m", repo_id="m", config={"model_type": "clip"}).text
    assert "Nothing was measured." in text and "Sources and licences of the training images are not recorded here" in text


def test_card_of_a_geolocalization_model_says_what_the_evaluation_says(evaluation):
    config = shipped_json("earthclip-mini", "config.json")
    card = card_from_template(
        "geolocalization",
        DATA,
        model_name="m",
        repo_id="me/m",
        config=config,
        evaluation=evaluation,
        imagery="Overhead imagery, not street photos.",
    )
    assert "3,017 geocells, with 3,413 prototypes" in card.text and "**Overhead imagery, not street photos.**" in card.text
    assert "It abstains from 12.9 % of them. Of the 4,354 others:" in card.text
    assert "The error radius at 90 % held the true place for 92.7 % of the images" in card.text
    assert "| median, km | 80.4 (77.8–82.7) |" in card.text and "| median, km | 69.9 (67.3–72.8) |" in card.text
    assert "## What it is not for" in card.text


@pytest.mark.parametrize("name", NAMES)
def test_top_of_a_template_lists_its_variables(name):
    text = template_path(name).read_text(encoding="utf-8")
    listed = set(re.findall(r"^  (\w+) {2,}\S", text.partition("-#}")[0], re.MULTILINE))
    assert listed == meta.find_undeclared_variables(jinja2.Environment().parse(text))


def test_hub_client_fills_the_templates_too(based):
    card = ModelCard.from_template(DATA, template_path=str(template_path("based")), **based)
    assert card.data.library_name == "geobased" and 'from_pretrained("me/mine")' in card.text and "{{" not in card.text


def test_what_is_missing_or_misspelt_is_named(based):
    with pytest.raises(ValueError, match="'based' has no variable limit; it has .*limits"):
        card_from_template("based", DATA, **based, limit=["English only."])
    del based["parameters"]
    with pytest.raises(ValueError, match="'based' needs parameters as well"):
        card_from_template("based", DATA, **based)
    with pytest.raises(
        ValueError, match="no model card template is named 'pigeon'; there are: based, geolocalization, reward, superhf"
    ):
        template_path("pigeon")
