"""Levels of access, canonical JSON, and the ledger."""

import copy

import pytest

from geobased.auditing import BLACK, DE_FACTO_WHITE, GREY, OUTSIDE, WHITE, Capability, access_name, parse_access
from geobased.auditing.canonical import canonical_json, read_json
from geobased.auditing.ledger import Ledger, ledger_problems


def test_levels_are_nested_and_the_outside_is_apart():
    assert BLACK in GREY and GREY in DE_FACTO_WHITE and DE_FACTO_WHITE in WHITE
    assert WHITE & ~DE_FACTO_WHITE == Capability.WEIGHTS
    assert not OUTSIDE & WHITE
    assert len(list(OUTSIDE)) == 7


@pytest.mark.parametrize("words", ["black", "grey+docs", "de_facto_white", "white+outside", "query+topk+input_grad"])
def test_names_of_grants_are_read_back(words):
    grant = parse_access(words)
    assert parse_access(access_name(grant)) == grant


def test_who_sees_all_scores_sees_the_best():
    assert parse_access("logits") == Capability.LOGITS | Capability.TOPK | Capability.QUERY


@pytest.mark.parametrize("words", ["blak", [], "black+secrets"])
def test_unknown_access_is_refused(words):
    with pytest.raises(ValueError, match="access"):
        parse_access(words)


def test_canonical_json_is_that_of_rfc_8785():
    # the examples of the RFC's sections 3.2.2 and 3.2.3
    text = (
        r'{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],'
        r' "string": "\u20ac$\u000F\u000aA' + "'" + r'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}'
    )
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonical_json(read_json(text)) == expected.encode()
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    order = ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert list(read_json(canonical_json(dict.fromkeys(names, 0)))) == order


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1, "a": 2}'])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)


@pytest.fixture
def ledger():
    written = Ledger()
    written.append("open", details={"granted": ["query", "topk"], "access": "black+topk", "model": {}})
    scope = {"technique": "t", "item": "i", "capabilities": ["query"], "granted": ["query"], "budget": 2.0}
    written.append("open_scope", scope=1, details=scope)
    written.append("generate", scope=1, capabilities=Capability.QUERY, forward=2.0)
    written.append("close_scope", scope=1)
    return written


def rewritten(rows, change):
    """Rows with a change, chained anew as a forger would."""
    again = Ledger()
    for row in change(copy.deepcopy(rows)):
        kept = {
            name: row[name] for name in ("scope", "outcome", "input_sha256", "output_sha256", "forward", "backward", "details")
        }
        capabilities = parse_access(row["capabilities"]) if row["capabilities"] else Capability(0)
        again.append(row["verb"], capabilities=capabilities, **kept)
    return again.rows


def test_a_whole_ledger_has_no_problems(ledger):
    assert ledger_problems(ledger.rows) == []


@pytest.mark.parametrize("place", range(4))
def test_a_missing_or_changed_row_breaks_the_chain(ledger, place):
    without = [row for row in ledger.rows if row["seq"] != place]
    changed = [{**row, "forward": 0.5} if row["seq"] == place else row for row in ledger.rows]
    # the last row is missed by the number of rows and the root, which the statement holds
    assert place == 3 or ledger_problems(without)
    assert "chain breaks" in ledger_problems(changed)[0]


def test_uses_beyond_the_grant_show_even_in_a_chain_that_holds(ledger):
    def beyond(rows):
        rows[2]["capabilities"] = ["topk"]
        return rows

    def outside(rows):
        rows[2]["scope"] = 0
        return rows

    def dear(rows):
        rows[2]["forward"] = 3.0
        return rows

    def wide(rows):
        rows[1]["details"]["capabilities"] = ["logits"]
        return rows

    for change, message in (
        (beyond, "uses topk, which was not granted"),
        (outside, "outside any technique"),
        (dear, "more than its scope's budget"),
        (wide, "beyond its grant"),
    ):
        assert message in ledger_problems(rewritten(ledger.rows, change))[0]
    assert ledger_problems([{"seq": 0}])
    assert ledger_problems([])
