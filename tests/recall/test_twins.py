"""Equal twins: the training loop against a plain one, equal sizes, and the whole experiment in small."""

import json
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import geobased
from geobased.kernels.sliding_window_attention_step import sliding_window_attention_step
from geobased.modeling_based.configuration_based import BasedConfig
from geobased.modeling_based.modeling_based import BasedForCausalLM
from geobased.recall.gazetteer_benchmark import benchmark_examples, evaluate_benchmark
from geobased.recall.gazetteer_recall import closed_book_documents, locate_questions
from geobased.recall.places import load_places
from geobased.recall.twin_data import Workers, document_rows, located_examples
from geobased.recall.twin_throughput import (
    GRAPHS,
    GRAPHS_SDPA,
    equal_llama,
    full_ring_attention_step,
    timed_generation,
    ways_to_generate,
)
from geobased.recall.twin_training import (
    OptimizerSettings,
    Rows,
    Trainer,
    learning_rates,
    row_order,
    validation_losses,
    weighted_loss,
)
from geobased.recall.twins import (
    MODELS,
    PRESETS,
    PhaseSettings,
    TwinSettings,
    chosen_learning_rate,
    fastest,
    load_results,
    num_parameters,
    plot_throughput_against_recall,
    plot_twins,
    run_twins,
    twin_config,
)

PAD = 1
SETTINGS = replace(
    PRESETS["smoke"],
    hidden_size=32,
    intermediate_size=64,
    tokens=6_000,
    tokens_per_step=512,
    phases=(
        PhaseSettings(128, 0.5, num_documents=20, max_words=40, max_records=2, num_validation=4),
        PhaseSettings(256, 0.5, num_documents=10, max_words=80, max_records=6, num_validation=4),
    ),
    lengths=(128, 192),
    num_examples=3,
    num_training_examples=2,
    num_held_out_documents=2,
    throughput_lengths=(128,),
    throughput_batch_size=2,
    new_tokens=24,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(geobased.checkpoint_path("based-mini"))


def small_model(seed: int = 0) -> BasedForCausalLM:
    torch.manual_seed(seed)
    config = BasedConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        sliding_window=8,
        mixers=["conv", "linear_attention", "sliding_attention", "conv"],
        pad_token_id=PAD,
    )
    return BasedForCausalLM(config)


def repeating_rows(count: int = 12, length: int = 24) -> Rows:
    """The second half of a row repeats the first and counts as answers; two tokens of padding follow."""
    half = torch.randint(2, 50, (count, length // 2 - 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tokens = torch.cat([half, half, torch.full((count, 2), PAD, dtype=torch.int32)], 1)
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    answers[:, half.shape[1] : -2] = True
    return Rows(tokens, answers, count)


def test_the_flat_training_loop_is_a_plain_one_with_adamw_clipping_and_schedule():
    rows, settings = repeating_rows(), OptimizerSettings(3e-3, max_grad_norm=0.5)
    phases = [(rows, row_order(rows, 4, 3, 0.0, seed=5)), (rows, row_order(rows, 3, 2, 0.0, seed=6))]
    run = Trainer(small_model(), phases, settings, pad_token_id=PAD).run()

    model = small_model()
    embeddings = model.model.embed_tokens.weight
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not embeddings]
    others = [p for p in model.parameters() if p.ndim < 2 or p is embeddings]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    expected, rates = [], learning_rates(settings, 7)
    for rows, order in phases:
        for chosen in order:
            ids = rows.tokens[chosen].long()
            loss = weighted_loss(model, ids, rows.answers[chosen], PAD, settings.answer_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in optimizer.param_groups:
                group["lr"] = rates[len(expected)].item()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    assert run.losses == pytest.approx(expected, rel=1e-4)
    assert (run.steps, run.tokens, run.captured) == (7, 24 * (4 * 3 + 3 * 2), False)


def test_the_weighted_loss_counts_answers_more_and_padding_not_at_all():
    model, rows = small_model(), repeating_rows(2)
    ids, answers = rows.tokens.long(), rows.answers
    logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    on_answers, real = answers[:, 1:], ids[:, 1:] != PAD
    plain = losses[real & ~on_answers].sum() + 4 * losses[on_answers].sum()
    expected = plain / ((real & ~on_answers).sum() + 4 * on_answers.sum())
    torch.testing.assert_close(weighted_loss(model, ids, answers, PAD, 4.0), expected)
    measured = validation_losses(model, rows, PAD)
    assert measured["documents"] == pytest.approx(losses[real].mean().item(), rel=1e-5)
    assert measured["answers"] == pytest.approx(losses[on_answers].mean().item(), rel=1e-5)


def test_training_in_bfloat16_keeps_float32_weights_and_learns():
    model, rows = small_model(), repeating_rows()
    trainer = Trainer(
        model, [(rows, row_order(rows, 60, 6, 0.0, seed=0))], OptimizerSettings(5e-3), pad_token_id=PAD, dtype=torch.bfloat16
    )
    run = trainer.run()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {w.master.dtype for w in trainer.weights} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert run.losses[-1] < 0.7 * run.losses[0]
    measured = validation_losses(model, rows, PAD)
    trainer.release()
    assert all(weights.master.untyped_storage().nbytes() == 0 for weights in trainer.weights)
    assert validation_losses(model, rows, PAD) == measured  # the model has weights of its own


def test_a_diverging_run_raises_and_names_the_step():
    rows = repeating_rows()
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="at step 0: choose a smaller learning rate"):
        Trainer(model, [(rows, row_order(rows, 2, 2, 0.0, seed=0))], OptimizerSettings(1e-3), pad_token_id=PAD).run()


def test_a_training_that_would_not_be_done_in_time_stops_early():
    rows = repeating_rows()
    order = row_order(rows, 100_000, 6, 0.0, seed=0)
    trainer = Trainer(small_model(), [(rows, order)], OptimizerSettings(5e-3), pad_token_id=PAD)
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"would be done \d+ s after its deadline"):
        trainer.run(start + 5)
    assert time.perf_counter() - start < 5


def test_rows_come_once_before_any_comes_again_and_text_has_its_share():
    tokens = torch.zeros(30, 4, dtype=torch.int32)
    rows = Rows(tokens, tokens.bool(), num_documents=20)
    order = row_order(rows, steps=50, batch_size=8, text_share=0.25, seed=3).flatten()
    documents, text = order[order < 20], order[order >= 20]
    assert sorted(documents[:20].tolist()) == list(range(20))
    assert sorted(text[:10].tolist()) == list(range(20, 30))
    assert 60 < len(text) < 140
    assert torch.equal(order, row_order(rows, 50, 8, 0.25, seed=3).flatten())
    assert not torch.equal(order, row_order(rows, 50, 8, 0.25, seed=4).flatten())


def test_the_learning_rate_rises_stays_and_falls():
    rates = learning_rates(OptimizerSettings(1.0, warmup=0.1, decay=0.4), 100)
    assert rates[0] == pytest.approx(0.1)
    assert (rates[9:61] == 1).all()
    assert rates[-1] == pytest.approx(1 / 40)


def test_rows_and_examples_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path):
    phase, places = SETTINGS.phases[0], load_places("train")
    rows, examples = [], []
    for number in (1, 2):
        with Workers(number) as workers:
            collect = located_examples("train", tokenizer, (128, 192), 6, workers)
            rows.append(document_rows(phase, tokenizer, tmp_path / str(number), workers))
            examples.append(collect())
    assert torch.equal(rows[0].tokens, rows[1].tokens) and torch.equal(rows[0].answers, rows[1].answers)
    assert examples[0] == examples[1] and examples[0].examples == benchmark_examples(places, tokenizer, (128, 192), 6)
    example = examples[0].examples[-1]
    assert examples[0].located[example.document] == locate_questions(example.document, tokenizer)
    assert closed_book_documents([example.document])[0] in examples[0].located
    # made once, then read
    with Workers(deadline=0.0) as late:
        assert torch.equal(document_rows(phase, tokenizer, tmp_path / "1", late).tokens, rows[0].tokens)
        with pytest.raises(TimeoutError, match="not done by the deadline"):
            document_rows(phase, tokenizer, tmp_path / "1", late, counterfactual_names=0.0)


def test_tokens_that_are_known_give_the_same_recall(tokenizer):
    torch.manual_seed(0)
    model = BasedForCausalLM(twin_config("based", SETTINGS, tokenizer))
    examples = located_examples("held_out", tokenizer, (128,), 3, Workers())()
    known = evaluate_benchmark(model, None, examples.examples, contains=False, located=examples.located)
    assert known == evaluate_benchmark(model, tokenizer, examples.examples, contains=False)


@pytest.mark.parametrize("preset", ["standard", "long"])
def test_twins_have_equal_sizes(tokenizer, preset):
    settings = PRESETS[preset]
    sizes = {name: num_parameters(twin_config(name, settings, tokenizer)) for name in MODELS}
    assert 10e6 < sizes["based"] < 30e6
    assert all(abs(size - sizes["based"]) < 0.003 * sizes["based"] for size in sizes.values())
    based = twin_config("based", settings, tokenizer)
    llama = equal_llama(sizes["based"], based, 1024)
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        assert abs(LlamaForCausalLM(llama).num_parameters() - sizes["based"]) < 0.003 * sizes["based"]


def test_attention_twins_see_the_whole_context(tokenizer):
    settings = TwinSettings()
    for name, mixers in (("attention", {"conv", "sliding_attention"}), ("llama", {"sliding_attention"})):
        config = twin_config(name, settings, tokenizer)
        assert set(config.mixers) == mixers
        assert config.sliding_window == 8192 == settings.context_length
    assert twin_config("sliding_window", settings, tokenizer).sliding_window == 64
    with pytest.raises(ValueError, match="no twin 'mamba'; choose from based, attention"):
        twin_config("mamba", settings, tokenizer)


def test_full_attention_is_timed_in_graphs_of_its_own(tokenizer):
    cuda = torch.device("cuda")
    for name, length, ways in (
        ("based", 8192, [GRAPHS]),
        ("attention", 1024, [GRAPHS, GRAPHS_SDPA]),
        ("attention", 8192, [GRAPHS_SDPA]),
    ):
        config = twin_config(name, TwinSettings(), tokenizer, context_length=length)
        assert ways_to_generate(config, length, cuda, compiled=True) == ways


def test_attention_over_a_full_ring_is_the_step_of_a_window():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 16)
    rings = [torch.randn(2, 4, 8, 16) for _ in range(2)]
    angles = torch.randn(1, 8).repeat(1, 2)
    options = {"cos": angles.cos(), "sin": angles.sin(), "softmax_scale": 0.25}
    position = torch.tensor([19], dtype=torch.int32)
    expected_rings, measured_rings = [ring.clone() for ring in rings], [ring.clone() for ring in rings]
    expected = sliding_window_attention_step(q, k, v, *expected_rings, position, **options)
    torch.testing.assert_close(full_ring_attention_step(q, k, v, *measured_rings, position, **options), expected)
    torch.testing.assert_close(measured_rings, expected_rings)


def test_of_several_learning_rates_the_best_on_validation_serves_the_other_seeds():
    settings = replace(SETTINGS, learning_rates=(1e-3, 3e-3), num_seeds=2)

    def run(rate: float, loss: float) -> dict:
        return {"model": "based", "seed": 0, "learning_rate": rate, "validation": {"128": {"documents": 0.0, "answers": loss}}}

    assert chosen_learning_rate({"runs": [run(1e-3, 2.0)]}, settings, "based") is None
    assert chosen_learning_rate({"runs": [run(1e-3, 2.0), run(3e-3, 1.0)]}, settings, "based") == 3e-3


def test_the_experiment_resumes_and_its_results_can_be_drawn(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea and the sea runs to the river.\n" * 40, encoding="utf-8")
    lines: list[str] = []

    def run(**options):
        options = {
            "models": ("based", "sliding_window"),
            "text": [text],
            "held_out_text": [text],
            "report": lines.append,
        } | options
        return run_twins(SETTINGS, tmp_path / "out", tokenizer, **options)

    first = run(models=("based",), throughput=False)
    assert first["complete"] and len(first["runs"]) == 1 and not first["throughput"]
    assert run(max_seconds=0.0)["complete"] is False
    assert lines[-1] == "0 seconds do not suffice for the speed of based at 128 tokens: call again to go on"
    assert run(max_seconds=0.0, throughput=False)["complete"] is False
    assert lines[-1] == "0 seconds do not suffice for the data: call again to go on"
    results = run(keep_models=True)
    assert results["complete"] and results == load_results(tmp_path / "out") == json.loads(json.dumps(results))
    assert results["runs"][0] == first["runs"][0]  # not trained again
    based, sliding = results["runs"]
    assert based["tokens"] == sliding["tokens"] == 6 * 512 * 2
    assert abs(based["num_parameters"] - sliding["num_parameters"]) < 0.05 * based["num_parameters"]
    assert based["learning_rate"] == 2e-3
    assert based["recall"]["num_examples"] == 3 * 2 and based["recall_training_places"]["num_examples"] == 2 * 2
    assert set(based["evaluation_seconds"]) == {"validation", "recall", "recall_training_places", "perplexity"}
    assert set(based["perplexity"]) == {"held_out_documents", "held_out_text"}
    assert based["perplexity"]["held_out_text"]["repeated"]["num_tokens"] > 0
    assert (tmp_path / "out" / "sliding_window-0-0.002" / "model.safetensors").is_file()

    assert [(row["model"], row["length"]) for row in results["rows"]] == [
        (name, length) for name in ("based", "sliding_window") for length in SETTINGS.lengths
    ]
    speed = fastest(results, "based", 128)
    assert speed["batch_size"] == 2 and speed["tokens_per_second"] > 0 and speed["way"] == "transformers' loop"
    row = results["rows"][0]
    known = based["recall_training_places"]["exact"]["by_length"]["128"]
    assert row["training_places_accuracy"] == known["accuracy"] and known["num_questions"] == 2
    assert row["tokens_per_second"] == speed["tokens_per_second"] and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    assert row["state_bytes"] > results["rows"][2]["state_bytes"] > 0
    assert fastest(results, "transformers_llama", 128) is not None and fastest(results, "based", 192) is None

    with pytest.raises(ValueError, match=r"has other settings \(tokens\): choose another folder"):
        run_twins(replace(SETTINGS, tokens=1), tmp_path / "out", tokenizer, text=[text], held_out_text=[text])

    more = run_twins(
        replace(SETTINGS, num_seeds=2), tmp_path / "out", tokenizer, models=["based"], text=[text], held_out_text=[text],
        throughput=False, report=lines.append,
    )  # fmt: skip
    assert more["runs"][:2] == results["runs"] and more["runs"][2]["seed"] == 1
    assert more["runs"][2]["losses"] != based["losses"]  # other weights, other rows
    assert more["runs"][2]["validation"].keys() == based["validation"].keys()
    assert len(list((tmp_path / "out" / "data").glob("documents-*"))) == 2 * len(SETTINGS.phases)  # the same documents

    for plot, name in ((plot_twins, "twins.png"), (plot_throughput_against_recall, "recall.png")):
        plot(more, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no finished run yet"):
        plot_twins({"rows": []}, tmp_path / "none.png")


def test_results_must_be_there_to_be_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json does not exist: train the twins first"):
        load_results(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["based", "attention"])
def test_captured_steps_train_as_eager_ones(tokenizer, name):
    torch.manual_seed(0)
    tokens = torch.randint(2, 4096, (16, 256), dtype=torch.int32, device="cuda")
    rows = Rows(tokens, torch.rand(16, 256, device="cuda") < 0.2, 16)
    longer = Rows(tokens.view(8, 512), rows.answers.view(8, 512), 8)
    losses = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = BasedForCausalLM(twin_config(name, PRESETS["smoke"], tokenizer)).cuda()
        phases = [(rows, row_order(rows, 12, 8, 0.0, seed=0)), (longer, row_order(longer, 8, 4, 0.0, seed=1))]
        run = Trainer(model, phases, OptimizerSettings(2e-3), pad_token_id=PAD, dtype=torch.bfloat16, captured=captured).run()
        assert run.captured is captured
        losses.append(run.losses)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["based", "attention"])
def test_generation_is_timed_in_cuda_graphs(tokenizer, name):
    cuda = torch.device("cuda")
    config = twin_config(name, PRESETS["smoke"], tokenizer, context_length=256)
    for way in ways_to_generate(config, 256, cuda, compiled=False):
        assert timed_generation(config, way, 4, 192, 64, cuda, torch.bfloat16).tokens_per_second > 0
