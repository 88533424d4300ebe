"""A small question about the tiny model, and a report of it."""

from pathlib import Path

import pytest

pytest.importorskip("rfc8785")
pytest.importorskip("cryptography")


@pytest.fixture(scope="session")
def configuration(tiny_model_dir: Path):
    """Black and grey access to the tiny model in this process; two items, of which the first is answered as asked."""
    from geobased.auditing.configuration import AuditConfiguration

    items = [
        {"id": "first", "prompt": "the river runs past", "reference": "not what it says"},
        {"id": "second", "prompt": "the town", "reference": ""},
    ]
    return AuditConfiguration.from_dict(
        {
            "model": str(tiny_model_dir),
            "mode": "in_process",
            "access": ["black", "grey"],
            "question": {
                "name": "tiny",
                "text": "Does <the> model leave the reference out?",
                "objective": "suppress",
                "success": "lacks",
                "budget": 6,
                "max_new_tokens": 4,
                "items": items,
            },
            "techniques": ["template_sensitivity", {"name": "best_of_n", "most": 4}],
        }
    )


@pytest.fixture(scope="session")
def report(configuration):
    from geobased.auditing.report import run_audit

    return run_audit(configuration)


@pytest.fixture
def target(tiny_model_dir: Path):
    """The tiny model in this process, all granted."""
    from geobased.auditing import AuditTarget

    with AuditTarget.open(str(tiny_model_dir), "white", mode="in_process") as opened:
        yield opened
