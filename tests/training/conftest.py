import json

import pytest

from geobased.recall.gazetteer_documents import document_json, generate_documents
from geobased.recall.places import load_places
from geobased.training.tokenization import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with text.txt, documents.jsonl, validation.jsonl and tokenizer/ (400 ids)."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = list(generate_documents(load_places("train"), 60, seed=1, max_words=60, max_records=3))
    text = "".join(f"{place.name} lies in {place.region}, {place.country}.\n" for place in load_places("train")[:300])
    (folder / "text.txt").write_text(text, encoding="utf-8")
    for name, part in (("documents", documents[:50]), ("validation", documents[50:])):
        lines = "".join(document_json(document) + "\n" for document in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer([text, *(d.text for d in documents)], vocab_size=400).save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            }
        )
    )
    return folder
