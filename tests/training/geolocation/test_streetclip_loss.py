import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from geobased.training import streetclip_loss
from geobased.training.streetclip_loss import cached_backward, contrastive_loss, gather_rows


class Towers(nn.Module):
    """Two towers with dropout, and CLIP's temperature."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 5))
        self.text = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 5))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, chunk):
        images, texts = chunk
        return (nn.functional.normalize(side, dim=-1) for side in (self.image(images), self.text(texts)))


def inputs(count=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype) for width in (6, 4))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def cached(model, images, texts, size, ids=None):
    model.zero_grad()
    chunks = list(zip(images.split(size), texts.split(size), strict=True))
    return cached_backward(
        chunks,
        embed=lambda chunk: tuple(model(chunk)),
        loss=lambda a, b: contrastive_loss(a, b, model.logit_scale.exp(), ids),
        backward=torch.Tensor.backward,
        loss_parameters=[model.logit_scale],
    )


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("share", [False, True])
def test_cached_gradients_are_those_of_the_whole_batch(size, share):
    torch.manual_seed(0)
    model, (images, texts) = Towers(), inputs()
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]) if share else None
    loss = contrastive_loss(*model((images, texts)), model.logit_scale.exp(), ids)
    loss.backward()
    plain = gradients(model)
    assert cached(model, images, texts, size, ids) == pytest.approx(loss.item(), abs=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-6)


def test_both_passes_draw_the_same_dropout_and_leave_the_generator_as_one_pass_would():
    torch.manual_seed(0)
    model, (images, texts) = Towers(dropout=0.3).double(), inputs(dtype=torch.float64)
    chunks = list(zip(images.split(4), texts.split(4), strict=True))
    torch.manual_seed(7)
    sides = zip(*(tuple(model(chunk)) for chunk in chunks), strict=True)
    contrastive_loss(*(torch.cat(side) for side in sides), model.logit_scale.exp()).backward()
    plain, after = gradients(model), torch.rand(1)
    torch.manual_seed(7)
    cached(model, images, texts, 4)
    assert torch.equal(torch.rand(1), after)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-12)


def test_loss_by_hand():
    # two orthogonal pairs at scale s: every row has the logits (s, 0)
    eye, scale = torch.eye(2), torch.tensor(3.0)
    expected = math.log(1 + math.exp(-3.0))
    assert contrastive_loss(eye, eye, scale).item() == pytest.approx(expected, abs=1e-6)
    # the same caption twice: a plain loss makes it a negative of itself, a shared one does not
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    shared = contrastive_loss(images, texts, scale, torch.tensor([5, 5]))
    rows = [(3 + math.log(1 + math.exp(-3))) * 0.5 + math.log(1 + math.exp(-3)) * 0.5, math.log(2), math.log(2)]
    image_side = (rows[1] + rows[2]) / 2
    text_side = rows[0]
    assert shared.item() == pytest.approx((image_side + text_side) / 2, abs=1e-6)


def test_agrees_with_clip(clip):
    from geobased.modeling_streetclip import StreetCLIPModel

    model = StreetCLIPModel.from_pretrained(clip).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(4, 3, 16, 16, generator=generator),
        "input_ids": torch.randint(2, 500, (4, 9), generator=generator),
    }
    output = model(**batch, return_loss=True)
    loss = contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp())
    torch.testing.assert_close(loss, output.loss)


def test_errors():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 3), torch.tensor(1.0))
    with pytest.raises(ValueError, match="no chunks"):
        cached_backward([], tuple, torch.add, torch.Tensor.backward)
    rows = torch.randn(2, 3)
    assert gather_rows(rows) is rows


SHARED_IDS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 6, 7, 8])

# runs this file with the loss alone: it needs torch, and importing the rest of the package takes longer than the test
PROCESS = """
import importlib.util, runpy, sys, types
name = "geobased.training.streetclip_loss"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
training = types.ModuleType("geobased.training")
training.streetclip_loss = module
sys.modules |= {"geobased": types.ModuleType("geobased"), "geobased.training": training, name: module}
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def _process(rank, folder):
    """One of two processes, each with half of the rows: gradients of the plain and of the cached pass."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for share in (False, True):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Towers())
        images, texts = (side.chunk(2)[rank] for side in inputs())
        ids = SHARED_IDS.chunk(2)[rank] if share else None

        def loss_of(a, b, model=model, ids=ids):
            return contrastive_loss(a, b, model.module.logit_scale.exp(), ids)

        loss_of(*model((images, texts))).backward()
        plain = gradients(model.module)
        model.zero_grad()
        chunks = list(zip(images.split(4), texts.split(4), strict=True))
        options = {"loss_parameters": [model.module.logit_scale], "no_sync": model.no_sync}
        cached_backward(chunks, lambda chunk, model=model: tuple(model(chunk)), loss_of, torch.Tensor.backward, **options)
        found[str(share)] = {"plain": plain, "cached": gradients(model.module)}
    if rank == 0:
        torch.save(found, Path(folder, "gradients.pt"))
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    # interpreters of their own: a fork of this one would inherit its locks
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    arguments = [streetclip_loss.__file__, __file__, str(tmp_path)]
    commands = [[sys.executable, "-c", PROCESS, *arguments, str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for share in (False, True):
        torch.manual_seed(0)
        model, (images, texts) = Towers(), inputs()
        contrastive_loss(*model((images, texts)), model.logit_scale.exp(), SHARED_IDS if share else None).backward()
        for name, gradient in gradients(model).items():
            for kind in ("plain", "cached"):
                torch.testing.assert_close(found[str(share)][kind][name], gradient, rtol=0, atol=1e-6)


if __name__ == "__main__":
    _process(int(sys.argv[4]), sys.argv[3])
