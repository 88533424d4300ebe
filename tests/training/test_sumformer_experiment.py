"""The approximation experiment of Sumformers: targets, equal models, training side by side, going on, findings and figures."""

import copy
import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from geobased.training import sumformer_experiment as module
from geobased.training.sumformer_experiment_cohorts import BETAS, Cohort, Run, TrainingSettings, on_plateau
from geobased.training.sumformer_experiment_findings import IN_PART, errs_less, findings, ladder_entries
from geobased.training.sumformer_experiment_models import FAMILIES, NUM_PARAMETERS, PSI_WIDTH, Architecture
from geobased.training.sumformer_experiment_settings import PRESETS, STANDARD_SIZE
from geobased.training.sumformer_experiment_targets import TARGETS, random_sets, standardised
from geobased.training.superhf_experiment_verdicts import FAILS, HOLDS, OPEN

CPU = torch.device("cpu")
TINY = TrainingSettings(20, 10, 10, 4, 10, points_per_step=64, validation_points=64, test_points=128)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_equivariant_and_standardised(target):
    for size in ((4, 1), STANDARD_SIZE, (16, 4)):
        x = random_sets(4000, *size, seed=7)
        y = standardised(target, x, size)
        assert y.shape == x.shape[:2]
        assert abs(y.mean()) < 0.1 and abs(y.var() - 1) < 0.15
        order = torch.randperm(size[0])
        torch.testing.assert_close(standardised(target, x[:, order], size), y[:, order], rtol=1e-4, atol=1e-4)


def test_targets_are_what_their_names_say():
    x = random_sets(3, 6, 3, seed=1).double()
    z = (2 * x - 1) * 3**0.5
    moments = torch.einsum("bki,bkj->bij", z, z) / 6 + 0.1 * torch.eye(3)
    lifted = moments.unsqueeze(1) + torch.einsum("bki,bkj->bkij", z, z)
    torch.testing.assert_close(TARGETS["determinant"](x), lifted.logdet() - moments.logdet().unsqueeze(1))
    by_hand = torch.einsum("bid,bkd,bke->bi", z, z, z) / 6 + z.square().sum(-1)
    torch.testing.assert_close(TARGETS["polynomial"](x), by_hand)
    torch.testing.assert_close(TARGETS["rank"](x), x[..., 0].argsort(-1).argsort(-1).double() / 6)
    assert TARGETS["nearest_neighbour"](torch.tensor([[[0.0], [0.25], [1.0]]])).tolist() == [[0.25, 0.25, 0.75]]
    with pytest.raises(ValueError, match="'median' is none of polynomial"):
        standardised("median", x, (6, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_equal_in_size_and_equivariant_but_for_linformer(family):
    model = Architecture(family, *STANDARD_SIZE).build(seed=3)
    body = sum(p.numel() for name, p in model.named_parameters() if "score." not in name)
    assert abs(body - NUM_PARAMETERS) < 0.01 * NUM_PARAMETERS
    x, order = random_sets(5, *STANDARD_SIZE, seed=2), torch.randperm(8).roll(1)
    with torch.no_grad():
        difference = (model(x[:, order]) - model(x)[:, order]).abs().max().item()
        torch.testing.assert_close(Architecture(family, *STANDARD_SIZE).build(seed=3)(x), model(x))
    assert (difference > 1e-3) == (family == "linformer")


def test_equal_psi_keeps_its_width_while_the_sum_grows():
    narrow, wide = (Architecture("sumformer", 8, 2, latent, equal_psi=True).config() for latent in (1, 256))
    assert narrow.intermediate_size == wide.intermediate_size == PSI_WIDTH
    assert (narrow.latent_size, wide.latent_size) == (1, 256)
    with pytest.raises(ValueError, match="needs the family 'sumformer', not 'linformer'"):
        Architecture("linformer", 8, 2, latent_size=4)
    with pytest.raises(ValueError, match="'gru' is none of sumformer"):
        Architecture("gru", 8, 2)


@pytest.mark.parametrize("family", ["sumformer_fourier_bilinear", "transformer_1", "performer_16", "set_transformer"])
def test_models_side_by_side_learn_what_each_would_alone(family):
    """Against torch's Adam on one model at a time, on the same sets."""
    architecture = Architecture(family, 4, 2)
    cohort = Cohort(architecture, [Run("rank", 1e-2, 1), Run("polynomial", 3e-3, 0)], TINY, CPU)
    data = torch.Generator().manual_seed(0)
    models = [architecture.build(run.seed) for run in cohort.runs]
    optimizers = [
        torch.optim.Adam(model.parameters(), run.learning_rate, BETAS) for model, run in zip(models, cohort.runs, strict=True)
    ]
    for step in range(1, 8):
        if (step - 1) % cohort.drawn_steps == 0:
            cohort.draw()
            drawn = torch.rand(2, cohort.drawn_steps, TINY.points_per_step // 4, 4, 2, generator=data)
        cohort.train_step()
        sets = drawn[:, (step - 1) % cohort.drawn_steps]
        for run, model, optimizer, x in zip(cohort.runs, models, optimizers, sets, strict=True):
            optimizer.zero_grad()
            (model(x) - standardised(run.target, x, architecture.size)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = run.learning_rate * min(1.0, step / TINY.warmup_steps)
            optimizer.step()
    x = random_sets(6, 4, 2, seed=5)
    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
        torch.testing.assert_close(cohort.predict(x.unsqueeze(0)), expected, rtol=1e-3, atol=1e-4)


def test_a_plateau_is_a_quarter_without_two_percent():
    assert not on_plateau([1.0], 0.02)
    assert not on_plateau([1.0, 0.9, 0.8, 0.7], 0.02)
    assert on_plateau([1.0, 0.5, 0.5, 0.495], 0.02)
    assert on_plateau([1.0, 0.5, 0.5, 0.7], 0.02)
    assert not on_plateau([1.0, 0.9, 0.8, 0.8, 0.8, 0.8, 0.7, 0.8], 0.02)


def test_training_ends_with_a_falling_rate_and_is_evaluated_on_other_lengths():
    settings = replace(TINY, min_steps=20)
    cohort = Cohort(Architecture("linformer", 4, 2), [Run("rank", 1e-2, 0), Run("polynomial", 1e-2, 0)], settings, CPU)
    assert cohort.train()
    final = cohort.parameters.detach().clone()
    cohort.draw()
    cohort.train_step()
    assert torch.equal(final, cohort.parameters)  # the learning rate is zero
    polynomial, rank = cohort.evaluate((2, 4, 8))
    assert (polynomial.run.target, rank.run.target) == ("polynomial", "rank")
    for trained in (polynomial, rank):
        assert trained.steps == 30 and len(trained.validation) == 3
        assert trained.sup_error**2 >= trained.nmse > 0 and trained.equivariance_error > 1e-3
        assert list(trained.nmse_by_length) == [2]  # longer ones Linformer cannot read
    x = random_sets(settings.test_points // 4, 4, 2, seed=2_000_003)
    y = standardised("rank", x, (4, 2))
    with torch.no_grad():
        error = (cohort.predict(x.unsqueeze(0))[1] - y).square().mean() / y.var()
    assert rank.nmse == pytest.approx(error.item(), rel=1e-2)
    with pytest.raises(ValueError, match="multiples of check_steps=250"):
        TrainingSettings(max_steps=300)


def test_the_experiment_goes_on_where_it_stopped_and_does_nothing_twice(tmp_path, monkeypatch):
    preset = PRESETS["smoke"]
    first = module.run_experiment("smoke", tmp_path, device=CPU, workers=1, max_seconds=0)
    assert not first["complete"] and first["entries"] == [] and len(first["times"]) == 6
    one_seed = module.run_experiment("smoke", tmp_path, seeds=1, device=CPU, workers=1)
    assert one_seed["complete"] and all(entry["seeds"] == [0] for entry in one_seed["entries"])
    before = {module.entry_key(entry): entry["nmse"][0] for entry in copy.deepcopy(one_seed["entries"])}
    both = module.run_experiment("smoke", tmp_path, device=CPU, workers=1)
    assert both["complete"] and both["times"] == first["times"] and both["seconds"] > one_seed["seconds"]
    assert len(both["entries"]) == sum(len(targets) for targets in preset.targets_of().values())
    for entry in both["entries"]:
        assert entry["seeds"] == [0, 1] and entry["nmse"][0] == before[module.entry_key(entry)]
        assert entry["learning_rate"] == float(min(entry["tried"], key=entry["tried"].get))
        assert entry["tried"][f"{entry['learning_rate']:g}"] == entry["validation_nmse"][0]
        assert len(entry["seconds"]) == 2 and entry["flops_per_point"] > 0
        lengths = {"linformer": {"3"}}.get(entry["family"], {"3", "8"})
        standard = entry["num_elements"] == 4 and entry["latent_size"] is None
        assert set(entry["nmse_by_length"]) == (lengths if standard else set())
    monkeypatch.setattr(module, "train_architecture", lambda *arguments: pytest.fail("trained again"))
    again = module.run_experiment("smoke", tmp_path, device=CPU, workers=1)
    assert again["entries"] == both["entries"] == module.load_results(tmp_path)["entries"]
    pytest.importorskip("matplotlib")
    from geobased.training.sumformer_experiment_plots import plot_experiment

    names = {path.name for path in plot_experiment(again, tmp_path)}
    assert names == {"models.png", "latent.png", "set_size.png", "lengths.png", "times.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_other_settings_and_failures_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="preset 'huge' is none of standard, smoke"):
        module.run_experiment("huge", tmp_path)
    with pytest.raises(ValueError, match="seeds=0"):
        module.run_experiment("smoke", tmp_path, seeds=0)
    with pytest.raises(FileNotFoundError, match="run the experiment first"):
        module.load_results(tmp_path)
    module.run_experiment("smoke", tmp_path, device=CPU, workers=1, max_seconds=0)
    with pytest.raises(ValueError, match="is of preset 'smoke'"):
        module.run_experiment("standard", tmp_path, device=CPU)
    original = Architecture.build

    def fails_for_linformer(self, seed=0):
        if self.family == "linformer":
            raise RuntimeError("no such model today")
        return original(self, seed)

    monkeypatch.setattr(Architecture, "build", fails_for_linformer)
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], training=PRESETS["smoke"].training))
    with pytest.raises(RuntimeError, match="1 architectures failed, the others are kept: linformer-n4-d2"):
        module.run_experiment("smoke", tmp_path, seeds=1, device=CPU, workers=1)
    kept = module.load_results(tmp_path)
    assert not kept["complete"] and {entry["family"] for entry in kept["entries"]} == {"sumformer", "set_transformer"}


def entry(architecture, target, nmse, **changes):
    return {
        **asdict(architecture),
        "target": target,
        "num_parameters": 20_033,
        "nmse": nmse,
        "seeds": list(range(len(nmse))),
        "equivariance_error": [1e-6] * len(nmse),
        "plateau": [True] * len(nmse),
        "nmse_by_length": {},
    } | changes


def test_findings_follow_from_the_seeds():
    def model(family, target, nmse, **changes):
        return entry(Architecture(family, *STANDARD_SIZE), target, nmse, **changes)

    entries = [
        model("sumformer", "kernel_density", [0.6, 0.5]),
        model("transformer_2", "kernel_density", [0.06, 0.05], nmse_by_length={"64": [0.1, 0.06]}),
        model("sumformer_stacked", "kernel_density", [0.055, 0.07]),
        model("sumformer", "rank", [0.01, 0.02]),
        model("transformer_2", "rank", [0.1, 0.2], plateau=[True, False]),
        model("linformer", "rank", [0.1, 0.3], equivariance_error=[0.2, 0.4]),
        *(
            entry(Architecture("sumformer", 8, 1, latent, equal_psi=True), "maximum", [error, 1.1 * error])
            for latent, error in ((4, 0.1), (8, 0.01), (16, 0.012))
        ),
    ]
    times = [
        {"family": family, "num_elements": n, "milliseconds": time}
        for family, n, time in (
            ("sumformer", 64, 1.0),
            ("transformer_2", 64, 0.5),
            ("sumformer", 256, 1.0),
            ("transformer_2", 256, 3),
        )
    ]
    found = findings({"preset": "standard", "entries": entries, "times": times})
    by_claim = {finding.claim.split(" (")[0]: finding for finding in found}
    attention = by_claim["Transformer, two layers errs less than Sumformer, MLP φ"]
    assert attention.verdict == IN_PART and attention.evidence == "less: kernel density (10); more: rank (0.1)"
    assert by_claim["Sumformer, two blocks errs less than Sumformer, MLP φ"].verdict == HOLDS
    assert by_claim["Sumformer, two blocks errs less than Transformer, two layers"].verdict == OPEN
    equivariance = by_claim["All models but Linformer are permutation equivariant"]
    assert equivariance.verdict == HOLDS and "Linformer 0.4, all others 1.0e-06" in equivariance.evidence
    bound = by_claim["On sets of numbers the error falls where d' passes n - 1"]
    assert bound.verdict == HOLDS and "maximum 0.11 to 0.01" in bound.evidence
    assert by_claim["All trainings reached a plateau"].verdict == FAILS
    speed = by_claim["Sumformer, MLP φ takes less time than Transformer, two layers"]
    assert (speed.verdict, speed.evidence) == ("holds on some sizes", "times as long: n = 64 0.5, n = 256 3")
    assert errs_less(entries[1], model("sumformer", "rank", [0.2])) is None  # a single seed tells nothing
    assert [entry["family"] for entry in ladder_entries({"preset": "smoke", "entries": entries}, "models")] == []
    with pytest.raises(ValueError, match="preset 'none', which is none of"):
        findings({"preset": "none", "entries": entries})


def test_diverged_trainings_are_told_in_plain_json():
    preset = replace(PRESETS["smoke"], learning_rates=(1e30,))
    found = module.train_architecture(preset, Architecture("sumformer", 4, 2), [], None)
    assert [entry["target"] for entry in found] == ["polynomial", "rank"]
    assert all(entry["tried"] == {"1e+30": None} and entry["nmse"] == [None] for entry in found)
    json.dumps(found, allow_nan=False)


@pytest.mark.gpu
def test_cuda_graphs_do_what_single_steps_do():
    runs = [Run("determinant", 1e-2, 0), Run("nearest_neighbour", 3e-3, 1)]
    for family in ("sumformer_fourier_bilinear", "transformer_2", "performer_16", "linformer", "set_transformer"):
        single, graphed = (Cohort(Architecture(family, 8, 2), runs, TINY, torch.device("cuda")) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw, step, validate = graphed.captured()
        for i in range(10):
            if i % single.drawn_steps == 0:
                single.draw()
                draw()
            single.train_step()
            step()
        single.validate()
        validate()
        torch.testing.assert_close(graphed.validation_errors, single.validation_errors, rtol=1e-3, atol=1e-4)
