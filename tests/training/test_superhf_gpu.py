"""SuperHF on a GPU: BASED samples by its fast path there, and a step is the step of a CPU."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from geobased import BasedForSequenceClassification
from geobased.modeling_based import modeling_based
from geobased.training.reward_models import RewardModelScorer
from geobased.training.superhf_trainer import SuperHFTrainer

pytestmark = pytest.mark.gpu
CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "based-mini"
PROMPTS = ("The capital of", "A", "Windhoek is the largest city of the country, which lies in", "Rome:")


def vowels(prompts, completions, **_):
    return [float(sum(text.count(v) for v in "aeiou")) for text in completions]


class Replaying(SuperHFTrainer):
    """Samples anew, or takes what another run has sampled."""

    def __init__(self, *args, sampled=None, **kwargs):
        self.sampled, self.replays = [] if sampled is None else list(sampled), sampled is not None
        super().__init__(*args, **kwargs)

    def _generate(self, prompts):
        if self.replays:
            return self.sampled.pop(0)
        self.sampled.append(super()._generate(prompts))
        return self.sampled[-1]


@pytest.fixture
def trained(superhf_args, mini_tokenizer):
    """Function that trains based-mini for a few steps; the trainer, and what it logged at each."""

    def train(dtype=torch.float32, use_cpu=False, sampled=None, learning_rate=1e-4, steps=2, **options):
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)
        args = superhf_args(use_cpu=use_cpu, learning_rate=learning_rate, max_steps=steps, max_completion_length=12)
        data = Dataset.from_dict({"prompt": list(PROMPTS)})
        trainer = Replaying(model, vowels, args, data, processing_class=mini_tokenizer, sampled=sampled, **options)
        trainer.train()
        return trainer, [log for log in trainer.state.log_history if "reward_filtered" in log]

    return train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_based_samples_by_cuda_graphs_while_it_trains(trained, mini_tokenizer, monkeypatch, dtype):
    served, fast_sample = [], modeling_based.fast_sample
    monkeypatch.setattr(modeling_based, "fast_sample", lambda *args, **kw: served.append(1) or fast_sample(*args, **kw))
    trainer, logs = trained(dtype, learning_rate=1e-3, steps=3)
    assert len(served) == 3
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-5) and logs[-1]["kl"] > 1e-3
    # the captured steps read the weights of the last optimizer step
    model = trainer.model.eval()
    batch = mini_tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt").to("cuda")
    logits = model(**batch).logits[:, -1]
    first = model.generate(**batch, max_new_tokens=1, do_sample=False)[:, -1]
    chosen = logits.gather(1, first.unsqueeze(1)).squeeze(1)
    assert (logits.max(-1).values - chosen).max() <= (0 if dtype == torch.float32 else 0.125), "a tie at most"


@pytest.mark.parametrize("adapter", [False, True])
def test_steps_are_those_of_a_cpu(trained, adapter):
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")} if adapter else {}
    gpu, logs = trained(**options)
    cpu, expected = trained(use_cpu=True, sampled=gpu.sampled, **options)
    assert next(cpu.model.parameters()).device.type == "cpu" and not cpu.sampled
    for log, other in zip(logs, expected, strict=True):
        for name in ("nll", "kl", "reward_filtered"):
            assert log[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name
    pairs = zip(gpu.model.named_parameters(), cpu.model.named_parameters(), strict=True)
    for (name, value), (_, other) in pairs:
        assert (value.detach().cpu() - other).norm() <= 5e-3 * other.norm() + 1e-6, name


def test_scores_of_a_reward_model_are_those_of_a_cpu(mini_tokenizer):
    torch.manual_seed(0)
    model = BasedForSequenceClassification.from_pretrained(CHECKPOINT, num_labels=1, dtype=torch.float32)
    texts = [" Namibia.", " Rome is the capital of Italy and of nothing else.\n", " 4", " 94,393\n"]
    scorers = (RewardModelScorer(model, mini_tokenizer, device=device, batch_size=3) for device in ("cpu", "cuda"))
    cpu, gpu = (scorer(PROMPTS, texts) for scorer in scorers)
    assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-4)
