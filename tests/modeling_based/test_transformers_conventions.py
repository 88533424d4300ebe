"""What users of transformers expect to work: auto classes, saving, resizing, PEFT, quantizers, offloading, Trainer."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    set_seed,
)

from geobased import BasedForCausalLM, BasedForSequenceClassification, BasedModel

CLASSES = {
    AutoModel: BasedModel,
    AutoModelForCausalLM: BasedForCausalLM,
    AutoModelForSequenceClassification: BasedForSequenceClassification,
}


# loading and saving


@pytest.mark.parametrize(("auto", "model_class"), CLASSES.items(), ids=lambda c: c.__name__)
def test_auto_classes(make_config, make_ids, tmp_path, auto, model_class):
    config = make_config(num_labels=3, pad_token_id=0)
    model = auto.from_config(config).eval()
    assert type(model) is model_class
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert not loaded.training
    ids = make_ids(2, 12)
    assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_saved_config_is_read_by_the_auto_classes(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("based", ["BasedForCausalLM"])


@pytest.mark.parametrize("source", [BasedForCausalLM, BasedModel], ids=["from_head", "from_base"])
def test_the_base_model_is_shared_between_heads(make_model, make_ids, tmp_path, source):
    model = make_model(source)
    model.save_pretrained(tmp_path)
    ids = make_ids(2, 12)
    base = model if source is BasedModel else model.model
    for target in CLASSES.values():
        loaded = target.from_pretrained(tmp_path, num_labels=2)
        loaded = loaded if target is BasedModel else loaded.model
        assert torch.equal(loaded(ids)[0], base(ids)[0]), f"{target.__name__} did not get the base model's weights"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saving_in_shards(make_model, make_ids, tmp_path, tied):
    model, ids = make_model(tie_word_embeddings=tied), make_ids(2, 12)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = BasedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for (name, p), q in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(p, q), f"{name} changed"
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loading_in_another_dtype(make_model, make_ids, assert_near, tmp_path, dtype):
    model, ids = make_model(initializer_range=0.05), make_ids(2, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    logits = loaded(ids).logits
    assert logits.dtype == dtype
    assert_near(logits, model(ids).logits, tolerance=2e-2, name=f"{dtype} logits")
    converted = model.to(dtype)
    assert converted.model.rotary_emb.inv_freq.dtype in (torch.float32, torch.float64), "casting rounds the frequencies"
    assert torch.equal(converted(ids).logits, logits)


def test_initialisation_on_meta_and_loading(make_config, make_model, make_ids, tmp_path):
    model, ids = make_model(), make_ids(2, 12)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert next(BasedForCausalLM(make_config()).parameters()).is_meta
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")(ids).logits, model(ids).logits)


def test_initial_weights():
    set_seed(0)
    from geobased import BasedConfig

    config = BasedConfig(hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=256, vocab_size=1000)
    model = BasedForCausalLM(config)
    residual = 0.02 / 16**0.5
    for name, parameter in model.named_parameters():
        std = parameter.std().item()
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif "conv1d" in name:
            assert parameter.abs().max() <= 3**-0.5
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            assert abs(std / residual - 1) < 0.1, f"{name} starts with deviation {std:.4f}"
        else:
            assert abs(std / 0.02 - 1) < 0.1, f"{name} starts with deviation {std:.4f}"


# the vocabulary


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_the_vocabulary(make_model, make_ids, tied):
    model = make_model(unpadded_vocab_size=55, tie_word_embeddings=tied)
    ids = make_ids(1, 12, vocab_size=40)
    before = model(ids).logits
    for arguments, vocab_size, real in (
        ({"new_num_tokens": 70}, 70, 70),
        ({"new_num_tokens": 71, "pad_to_multiple_of": 16}, 80, 71),
        ({"new_num_tokens": 50}, 50, 50),
    ):
        model.resize_token_embeddings(**arguments)
        assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (vocab_size, real)
        assert model.lm_head.weight.shape[0] == model.model.embed_tokens.weight.shape[0] == vocab_size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        logits = model(ids).logits
        assert logits.shape[-1] == vocab_size
        torch.testing.assert_close(logits[..., :50], before[..., :50])
        assert model.generate(ids, max_new_tokens=5).max() < real
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([[60]]))


def test_resizing_without_padding(make_model):
    model = make_model()
    model.resize_token_embeddings(64)
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (64, None)


# other libraries


def adapt(model, steps: int, ids: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_lora_trains_and_merges(make_model, make_ids, assert_near, targets):
    peft = pytest.importorskip("peft")
    model, ids = make_model(), make_ids(2, 20)
    before = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = {name.split(".lora_")[0].split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    if targets == "all-linear":
        linear = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
        assert trained == linear
    else:
        assert trained == set(targets)
    losses = adapt(adapted.train(), 8, ids)
    assert losses[-1] < losses[0] - 0.2, f"LoRA does not learn: {losses}"
    adapted.eval()
    logits = adapted(input_ids=ids).logits
    steps = adapted.generate(input_ids=ids, max_new_tokens=5)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, BasedForCausalLM)
    assert_near(merged(ids).logits, logits, tolerance=1e-4, name="merged logits")
    assert merged.generate(ids, max_new_tokens=5).tolist() == steps.tolist()
    assert (merged(ids).logits - before).norm() > 1e-2 * before.norm()


class Int8Linear(nn.Module):
    """As quantizers replace nn.Linear: there is no float weight to read, the product is only had by calling the module."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().clamp(-127, 127).to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_can_be_replaced_by_quantized_ones(make_model, make_ids, assert_near, dtype):
    model, ids = make_model(initializer_range=0.05).to(dtype), make_ids(2, 20)
    expected = model(ids).logits
    replaced = 0
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
                replaced += 1
    assert replaced == 2 + 4 + 4 + 3 * 3
    assert_near(model(ids, use_cache=False).logits, expected, tolerance=3e-2, name="logits of the quantized model")
    output = model.generate(ids, max_new_tokens=12, min_new_tokens=12)
    no_cache = model.generate(ids, max_new_tokens=12, min_new_tokens=12, use_cache=False)
    assert output.shape == (2, 32)
    if dtype == torch.float32:
        assert output.tolist() == no_cache.tolist()
    assert model.state_size_bytes(2) > 0
    assert model.dtype == dtype


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_device_map(make_model, make_ids, tmp_path, place):
    pytest.importorskip("accelerate")
    model, ids = make_model(), make_ids(2, 12)
    model.save_pretrained(tmp_path / "model")
    device_map = "auto"
    if place == "disk":  # every layer, one per mixer, lies on the disk until it is called
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= {f"model.layers.{i}": "disk" for i in range(3)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    if place == "disk":
        assert loaded.model.layers[0].mixer.conv1d.weight.is_meta, "the test does not test: nothing is offloaded"
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids, max_new_tokens=8).tolist() == model.generate(ids, max_new_tokens=8).tolist()


def test_layers_are_not_split_between_devices(make_model):
    accelerate = pytest.importorskip("accelerate")
    model = make_model(mixers=["conv", "linear_attention", "sliding_attention"] * 2)
    layer_size = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in model.model.layers)
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={0: 3 * layer_size, 1: 3 * layer_size, "cpu": 10**9}, no_split_module_classes=model._no_split_modules
    )
    inside = [name for name in device_map if name.startswith("model.layers.") and name.count(".") > 2]
    assert not inside, f"layers are split: {inside}"
    assert len(set(device_map.values())) > 1, "the test does not test: all fits on one device"


def test_tensor_parallel_plan_names_real_modules(make_model):
    model = make_model()
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.model.named_modules()}
    unknown = set(model.config.base_model_tp_plan) - names
    assert not unknown, f"the plan names modules that there are not: {unknown}"


# Trainer


class CountingUp(torch.utils.data.Dataset):
    """Sequences that count up from a random id: a few steps of training learn them."""

    def __init__(self, lengths: tuple[int, int] = (16, 17)):
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(1, 60, (64,), generator=generator)
        sizes = torch.randint(*lengths, (64,), generator=generator)
        self.rows = [((start + torch.arange(size)) % 60 + 1).tolist() for start, size in zip(starts, sizes, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(make_model, tmp_path, packed, gradient_checkpointing):
    pytest.importorskip("accelerate")
    model = make_model(initializer_range=0.02)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=40,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2 if packed else 1,
        learning_rate=1e-2,
        logging_steps=5,
        save_steps=40,
        gradient_checkpointing=gradient_checkpointing,
        report_to=[],
        seed=0,
        disable_tqdm=True,
    )
    collator = {"data_collator": DataCollatorWithFlattening()} if packed else {}
    dataset = CountingUp((3, 20)) if packed else CountingUp()
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, **collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 3.5
    assert losses[-1] < 1.5, f"the loss does not go down: {losses}"
    assert trainer.evaluate()["eval_loss"] < 1.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    expected = list(range(11, 25))
    assert loaded.generate(torch.tensor([expected[:4]]), max_new_tokens=10, do_sample=False)[0].tolist() == expected
