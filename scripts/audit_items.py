"""Draws the items of the audits of the shipped models (audits/): records that based-mini reads right, and crops.

python scripts/audit_items.py            # writes audits/based-mini/items.jsonl and audits/earthclip-mini/items.jsonl
"""

import json
import random
from pathlib import Path
from typing import Any

from geobased.auditing import AuditTarget
from geobased.checkpoints import checkpoint_path
from geobased.recall.gazetteer_documents import LABELS, format_value
from geobased.recall.places import Place, load_places
from geobased.whole_file import whole_file

ROOT = Path(__file__).resolve().parent.parent
SEED, COUNT, IMAGES, MOST_NEW_TOKENS, MOST_COST = 0, 12, 8, 16, 1000.0
FIELDS = ("population", "climate", "region")
AFTER = " Answer:"


def record(place: Place) -> str:
    return "\n".join([f"Name: {place.name}", *(f"{LABELS[field]}: {format_value(place, field)}" for field in FIELDS)])


def drawn_item(chooser: random.Random, places: list[Place]) -> dict[str, Any]:
    """Two records, and a question about one of them whose answer is another for the other."""
    field = chooser.choice(FIELDS)
    chosen = chooser.sample(places, 2)
    while format_value(chosen[0], field) == format_value(chosen[1], field):
        chosen = chooser.sample(places, 2)
    asked, other = chooser.sample(chosen, 2)
    records = "\n\n".join(record(place) for place in chosen)
    value = format_value(asked, field)
    prompt = f"{records}\n\nQuestion: What is the {LABELS[field].lower()} of {asked.name}?{AFTER}"
    wrong = format_value(other, field)
    return {"prompt": prompt, "reference": value, "other": wrong, "target": f" {wrong}", "after": AFTER}


def text_items() -> tuple[list[dict[str, Any]], int]:
    """Questions that the model answers right as they are, and how many were asked to find them."""
    chooser, places, items, asked = random.Random(SEED), load_places("held_out"), [], 0
    with AuditTarget.open("based-mini", "black") as target, target.scope("items", "black", budget=MOST_COST) as metered:
        while len(items) < COUNT:
            item = drawn_item(chooser, places)
            answer = metered.generate([item["prompt"]], max_new_tokens=MOST_NEW_TOKENS, stop=["\n"])[0][0]
            asked += 1
            if item["reference"] in answer:
                items.append({"id": f"{len(items):02d}", **item})
    return items, asked


def image_items() -> list[dict[str, Any]]:
    """The crops that earthclip-mini-planted is audited with, without what is asked of that model."""
    planted = Path(checkpoint_path("earthclip-mini-planted"), "audit.jsonl").read_text(encoding="utf-8")
    items = [json.loads(line) for line in planted.splitlines()[:IMAGES]]
    folder = "../../checkpoints/earthclip-mini-planted"
    places = [{name: item[name] for name in ("latitude", "longitude")} for item in items]
    return [{"id": item["id"], "image": f"{folder}/{item['image']}", **place} for item, place in zip(items, places, strict=True)]


def write(path: Path, items: list[dict[str, Any]]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    print(path.relative_to(ROOT))


def main() -> None:
    items, asked = text_items()
    print(f"based-mini answered {len(items)} of {asked} questions right")
    write(ROOT / "audits/based-mini/items.jsonl", items)
    write(ROOT / "audits/earthclip-mini/items.jsonl", image_items())


if __name__ == "__main__":
    main()
