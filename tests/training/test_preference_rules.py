import json

import pytest

from geobased.recall.places import is_held_out, load_places
from geobased.training import preference_rules
from geobased.training.preference_rules import (
    RULES,
    WEIGHTS,
    PreferenceArguments,
    half_of,
    preference_places,
    rule_reward,
    rule_scores,
    write_preferences,
)

PROMPT = "The population of Lund is 94,393.\nQuestion: What is the population of Lund? Answer:"


@pytest.mark.parametrize(
    ("rule", "completion", "score"),
    [
        ("answers_from_record", " 94,393\n", 1),
        ("answers_from_record", " 94,393.\nQuestion: more", 1),
        ("answers_from_record", " about 94,393 people\n", 0.5),
        ("answers_from_record", " 194,393\n", 0),
        ("answers_from_record", " 94,393,000\n", 0),
        ("answers_from_record", " 94,394\n", 0),
        ("answers_from_record", "", 0),
        ("names_no_other_place", " 94,393 in Lund.\n", 1),
        ("names_no_other_place", " 94,393 in Winterthur.\n", 0),
        ("names_no_other_place", " 94,393, as in North Bay\n", 0),
        ("names_no_other_place", " warm-summer continental\n", 1),
        ("ends_the_line", " 94,393.", 1),
        ("ends_the_line", " 94,393\n", 1),
        ("ends_the_line", " 94,393\nThe population of Lund is 94,393.\n", 0.5),
        ("ends_the_line", " 94,393 and", 0),
        ("ends_the_line", "\n", 0),
        ("repeats_nothing", " 94,393\n", 1),
        ("repeats_nothing", " 94,393.\n 94,393.\n 94,393.\n 94,393.\n", 0.25),
        ("repeats_nothing", " It is 48.9° N. It is 48.9° N.", 0.5),
        ("repeats_nothing", "", 1),
        ("length_within_bounds", " 94,393\n", 1),
        ("length_within_bounds", " word" * 24, 0.5),
        ("length_within_bounds", " \n", 0),
    ],
)
def test_each_rule_scores_what_it_says(rule, completion, score):
    assert RULES[rule](PROMPT, completion, "94,393") == score
    assert rule_scores(PROMPT, completion, "94,393")[rule] == score


def test_reward_is_the_weighted_mean_of_the_rules_for_texts_and_conversations():
    assert sum(WEIGHTS.values()) == pytest.approx(1) and WEIGHTS.keys() == RULES.keys()
    assert WEIGHTS["answers_from_record"] > 0.5, "a right value outweighs all form"
    completions = [" 94,393\n", " 94,394\n"]
    rewards = rule_reward(prompts=[PROMPT] * 2, completions=completions, answer=["94,393"] * 2, completion_ids=None)
    assert rewards == pytest.approx([1, 1 - WEIGHTS["answers_from_record"]])
    metrics = {}
    rule_reward([PROMPT] * 2, completions, ["94,393"] * 2, log_metric=metrics.__setitem__)
    assert metrics["rules/answers_from_record"] == 0.5 and metrics["rules/ends_the_line"] == 1
    conversations = [[{"role": "assistant", "content": text}] for text in completions]
    prompt = [{"role": "user", "content": PROMPT}]
    assert rule_reward(prompts=[prompt] * 2, completions=conversations, answer=["94,393"] * 2) == rewards
    with pytest.raises(ValueError, match="the answer is empty"):
        rule_scores(PROMPT, " 94,393\n", "")


def test_halves_share_no_name_and_hold_no_held_out_place():
    first, second, held_out = (preference_places(part) for part in ("first", "second", "held_out"))
    names = [{place.name for place in part} for part in (first, second, held_out)]
    assert not names[0] & names[1] and not (names[0] | names[1]) & names[2]
    assert not any(is_held_out(place.geonames_id) for place in [*first, *second])
    assert abs(len(first) - len(second)) < 0.1 * len(load_places("train"))
    assert all(half_of(place.name) == "first" for place in first[:100])
    with pytest.raises(ValueError, match="first, second or held_out, not 'third'"):
        preference_places("third")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    report = write_preferences(
        PreferenceArguments(str(folder), num_pairs=150, num_held_out_pairs=40, num_prompts=30, num_held_out_prompts=10)
    )
    rows = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in folder.glob("*.jsonl")
    }
    return folder, report, rows


def test_written_pairs_prefer_what_keeps_the_rules(written):
    _, report, rows = written
    assert {name: len(lines) for name, lines in rows.items()} == {name: entry["lines"] for name, entry in report["files"].items()}
    pairs = [pair for name in ("first_half.jsonl", "second_half.jsonl", "held_out.jsonl") for pair in rows[name]]
    for pair in pairs:
        scores = rule_reward([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]], [pair["answer"]] * 2)
        assert scores == pytest.approx([pair["chosen_score"], pair["rejected_score"]], abs=1e-6)
        assert scores[0] > scores[1]
        if not pair["chosen_corruption"]:
            assert scores[0] == pytest.approx(1) and pair["answer"] in pair["prompt"]
    flaws = {flaw for pair in pairs for flaw in pair["rejected_corruption"].split("+")}
    assert flaws == set(preference_rules.CORRUPTIONS)
    assert 0.6 < sum(not pair["chosen_corruption"] for pair in pairs) / len(pairs) < 0.95
    assert set(rows["prompts.jsonl"][0]) == {"prompt", "answer"}
    assert all(row["answer"] in row["prompt"] for row in rows["prompts.jsonl"])


def test_the_same_arguments_write_the_same_files_and_another_seed_others(written, tmp_path):
    folder, report, _ = written
    sizes = {key: value for key, value in report.items() if key not in ("output", "files")}
    write_preferences(PreferenceArguments(str(tmp_path / "same"), **sizes))
    write_preferences(PreferenceArguments(str(tmp_path / "other"), **(sizes | {"seed": 1})))
    for name in report["files"]:
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()
    with pytest.raises(ValueError, match="at least 1, not 0"):
        write_preferences(PreferenceArguments(str(tmp_path / "none"), num_prompts=0))
