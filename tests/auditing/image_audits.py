"""The CLIP of the reference values as an audited model, and questions about it."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BatchFeature, CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from geobased.auditing import AuditQuestion, AuditTarget, Item
from geobased.auditing.image_tries import as_levels
from geobased.auditing.objectives import IsNot, LeadAway, LeadTo

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "audit"
LABELS = ("a", "b", "c", "d", "e")
REFERENCE = json.loads((FIXTURES / "image.json").read_text(encoding="utf-8"))


def reference_images() -> torch.Tensor:
    return load_file(FIXTURES / "tiny_clip.safetensors")["images"]


def open_clip(grant: str) -> AuditTarget:
    tensors = load_file(FIXTURES / "tiny_clip.safetensors")
    model = CLIPModel(CLIPConfig(**json.loads((FIXTURES / "tiny_clip_config.json").read_text(encoding="utf-8")))).eval()
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})

    def tokenizer(texts, **options):
        assert len(texts) == len(LABELS)
        return BatchFeature({"input_ids": tensors["input_ids"]})

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return AuditTarget.open(model, grant, tokenizer=tokenizer, image_processor=processor, labels=LABELS)


def clip_question(folder: Path, budget: float, *, targeted: bool = False) -> AuditQuestion:
    """Items are the images of the reference values, rounded to 8 bits; success is another label than the model's own."""
    items = []
    for number, image in enumerate(reference_images()):
        Image.fromarray(as_levels(image)).save(folder / f"{number}.png")
        label = REFERENCE["labels(pred)"][number]
        values = {"image": f"{number}.png", "reference": LABELS[label], "target": LABELS[(label + 1) % 5]}
        items.append(Item(str(number), values))
    objective = LeadTo("label") if targeted else LeadAway("label")
    return AuditQuestion(objective, IsNot("label"), tuple(items), budget, folder=folder)
