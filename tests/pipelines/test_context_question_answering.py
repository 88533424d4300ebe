"""Questions about a context, answered through `pipeline("context-question-answering")`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

import geobased
from geobased import ContextQuestionAnsweringPipeline

CONTEXT = "The population of Lund is 94,393.\nThe population of Kiruna is 17,002.\nThe climate of Lund is humid subtropical."


@pytest.fixture(scope="module")
def reader() -> ContextQuestionAnsweringPipeline:
    return pipeline("context-question-answering", model=geobased.checkpoint_path("based-mini"), dtype="float32")


def test_is_registered(reader):
    assert type(reader) is ContextQuestionAnsweringPipeline
    assert type(reader.model).__name__ == "BasedForCausalLM"


def test_recalls_from_the_context(reader):
    result = reader(context="The population of Lund is 94,393.", question="What is the population of Lund?")
    assert result["answer"] == "94,393"
    assert result["question"] == "What is the population of Lund?"
    assert 0.2 < result["score"] <= 1


def test_equals_generating_from_the_whole_text(reader):
    """Reading once and copying the state gives what reading context and question together gives, for every question."""
    questions = ["What is the population of Lund?", "What is the climate of Lund?", "How many people live in Kiruna?"]
    results = reader(context=CONTEXT, question=[*questions, questions[0]])
    tokenizer, model = reader.tokenizer, reader.model
    for question, result in zip([*questions, questions[0]], results, strict=True):
        context = tokenizer(CONTEXT + "\n", return_tensors="pt").input_ids
        prompt = tokenizer(f"Question: {question} Answer:", return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([context, prompt], dim=1)
        tokens = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
        assert result["answer"] == tokenizer.decode(tokens).split("\n")[0].strip()
        length = reader._answer_length(tokens.tolist())
        with torch.no_grad():
            logits = model(torch.cat([ids, tokens[None, :length]], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, tokens[:length, None]).sum().exp().item()
        assert result["score"] == pytest.approx(expected, rel=1e-3)


def test_input_forms(reader):
    one = {"context": CONTEXT, "question": "What is the population of Lund?"}
    single = reader(one)
    assert reader([one, {**one, "question": ["What is the population of Lund?"]}]) == [single, [single]]
    assert list(reader(x for x in [one])) == [single]
    short = reader(one, max_new_tokens=1)
    assert single["answer"].startswith(short["answer"])
    assert reader(one, question_template="Q: {question} A:")["question"] == one["question"]


def test_any_causal_model(tmp_path, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    reader = pipeline("context-question-answering", model=model, tokenizer=tokenizer)
    results = reader(context="one two", question=["three?", "four?", "three?"], max_new_tokens=3)
    assert [result["question"] for result in results] == ["three?", "four?", "three?"]
    assert results[0] == results[2]


def test_saved_pipeline_loads_again(reader, tmp_path):
    reader.save_pretrained(tmp_path / "saved")
    # transformers saves the pipeline's code with it and runs that copy
    again = pipeline("context-question-answering", model=str(tmp_path / "saved"), dtype="float32", trust_remote_code=True)
    question = {"context": CONTEXT, "question": "What is the population of Kiruna?"}
    ours, theirs = reader(question), again(question)
    assert theirs["answer"] == ours["answer"] and theirs["score"] == pytest.approx(ours["score"], rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.model_type == "based"


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        (None, {"context": "x"}, "give context= and question="),
        ({"context": "x", "question": "y"}, {"question": "z"}, "not both"),
        ({"context": " ", "question": "y"}, {}, "context is empty"),
        ({"context": "x", "question": ["a", ""]}, {}, "is empty"),
        ({"context": "x", "question": []}, {}, "is empty"),
        ({"text": "x"}, {}, "dictionary with context and question"),
        ({"context": "x", "question": "y"}, {"question_template": "Q:"}, "question_template='Q:'"),
        ({"context": "x", "question": "y"}, {"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"context": "x", "question": "y"}, {"temperature": 1.0}, "unknown parameter 'temperature'"),
        ({"context": "x", "question": "y"}, {"batch_size": 2}, "batch_size"),
    ],
)
def test_bad_input(reader, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        reader(inputs, **arguments)
