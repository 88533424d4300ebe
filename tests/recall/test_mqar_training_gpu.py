import pytest
import torch

from geobased.recall.mixers_mqar import MIXERS
from geobased.recall.modeling_mqar import MQARConfig
from geobased.recall.mqar import Examples, Segment, generate_examples
from geobased.recall.mqar_training import TrainingSettings, train_cohort

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=2, batch_size=64, precision="fp32")


@pytest.fixture(scope="module")
def examples() -> tuple[list[Examples], list[Examples]]:
    # two chunks and more: the forms for one are compiled apart
    segments = [Segment(64, 4, 512), Segment(128, 8, 512)]
    return generate_examples(segments, [1, 2], 128, progress=False), generate_examples(segments, [3, 4], 128, progress=False)


@pytest.mark.parametrize("mixer", MIXERS)
def test_graphs_train_as_the_plain_step_on_a_cpu(examples, mixer):
    config = MQARConfig(vocab_size=128, hidden_size=64, mixers=["conv", mixer], embedding_dropout=0.0, sliding_window=8)
    (captured,) = train_cohort([(config, SETTINGS)], *examples, device=GPU)
    (plain,) = train_cohort([(config, SETTINGS)], *examples, device=CPU)
    assert captured.training_loss == pytest.approx(plain.training_loss, rel=2e-3)
    for name, weight in plain.model.state_dict().items():
        difference = (captured.model.state_dict()[name].cpu() - weight).norm() / weight.norm().clamp_min(1e-3)
        assert difference < 0.05, name


def test_runs_side_by_side_and_resumed_are_those_alone(examples, tmp_path, monkeypatch):
    config = MQARConfig(vocab_size=128, hidden_size=64, mixers=["conv", "linear_attention"])
    other = TrainingSettings(learning_rate=1e-2, epochs=2, batch_size=64, precision="fp32", seed=1)
    (alone,) = train_cohort([(config, SETTINGS)], *examples, device=GPU)
    beside = train_cohort([(config, other), (config, SETTINGS)], *examples, device=GPU)[1]
    assert beside.training_loss == pytest.approx(alone.training_loss, rel=1e-3)
    path = [tmp_path / "run.pt"]
    clock = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr("geobased.recall.mqar_training.time.monotonic", lambda: next(clock))
        assert train_cohort([(config, SETTINGS)], *examples, device=GPU, deadline=2, checkpoints=path) == [None]
    resumed = train_cohort([(config, SETTINGS)], *examples, device=GPU, checkpoints=path)[0]
    assert resumed.training_loss == pytest.approx(alone.training_loss, rel=1e-3)
