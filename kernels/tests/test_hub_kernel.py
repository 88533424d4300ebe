"""The kernels as the package `kernels` sees them: loaded by path, built for upload, put into a model by `use_kernels=True`."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parent.parent
ROOT = KERNELS.parent
FOLDER = KERNELS / "torch-ext" / "geobased_kernels"
LINK = KERNELS / "torch-universal"
# model function -> layer
LAYERS = {
    "add_rms_norm": "BasedAddRMSNorm",
    "gated_short_convolution": "BasedGatedShortConvolution",
    "gated_short_convolution_of_halves": "BasedGatedShortConvolutionOfHalves",
    "rotary_embedding": "BasedRotaryEmbedding",
    "silu_mul": "BasedSiluMul",
    "sliding_window_attention": "BasedSlidingWindowAttention",
    "taylor_linear_attention": "BasedTaylorLinearAttention",
    "taylor_linear_attention_step": "BasedTaylorLinearAttentionStep",
}


def kernels_is_installed() -> bool:
    # not `find_spec`: in the root of the repository it finds this project's own folder of that name
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return False
    return True


HAS_KERNELS = kernels_is_installed()
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the package `kernels` is not installed: pip install kernels")


def why_transformers_takes_no_kernels() -> str:
    """Empty if `use_kernels=True` works with what is installed."""
    from transformers.utils import import_utils

    if import_utils.is_kernels_available():
        return ""
    wanted = f"kernels >= {import_utils.KERNELS_MIN_VERSION}, < {import_utils.KERNELS_MAX_VERSION}"
    return f"transformers {metadata.version('transformers')} wants {wanted}"


needs_use_kernels = pytest.mark.skipif(bool(why_transformers_takes_no_kernels()), reason=why_transformers_takes_no_kernels())


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_hub_kernel", ROOT / "scripts" / "build_hub_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(builder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("hub") / "geobased-kernels"
    builder.build(output)
    return output


def run_python(code: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Output of `code` in a fresh interpreter that takes no notice of the network."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules"), **environment}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_build_is_complete(built, builder):
    settings = builder.build_settings()
    assert (built / "README.md").read_text(encoding="utf-8") == (KERNELS / "CARD.md").read_text(encoding="utf-8")
    folders = sorted((built / "build").iterdir())
    assert [folder.name for folder in folders] == sorted(f"torch-{backend}" for backend in settings["backends"])
    identifiers = set()
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert names == {path.name for path in FOLDER.glob("*.py")} | {"metadata.json"}
        written = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        assert written["backend"]["type"] == folder.name.removeprefix("torch-")
        assert (written["name"], written["version"]) == (settings["name"], settings["version"])
        identifiers.add(written["id"])
    assert len(identifiers) == len(folders)
    assert all(identifier.isidentifier() for identifier in identifiers)


def test_build_replaces_only_an_earlier_build(built, builder, tmp_path):
    assert builder.build(built)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an earlier build"):
        builder.build(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_identifier_follows_the_sources(builder, tmp_path):
    (tmp_path / "op.py").write_text("a = 1")
    before = builder.digest([tmp_path / "op.py"])
    (tmp_path / "op.py").write_text("a = 2")
    assert builder.digest([tmp_path / "op.py"]) != before


def test_metadata_beside_the_sources_is_what_the_script_writes(builder):
    assert (FOLDER / "metadata.json").read_text(encoding="utf-8") == builder.source_metadata()


def test_every_function_of_the_mixers_has_a_layer():
    source = (ROOT / "modeling_based" / "mixers_based.py").read_text(encoding="utf-8")
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("geobased.kernels.")
        for alias in node.names
    }
    replaceable = dict(
        (function, layer) for layer, function in re.findall(r'replaceable_function\(\s*"(\w+)", (\w+)\s*\)', source)
    )
    assert replaceable == LAYERS
    assert imported == set(LAYERS)


LOAD = """
import sys
from pathlib import Path
from kernels import get_local_kernel

sys.modules["geobased"] = None
kernel = get_local_kernel(Path(sys.argv[1]))
import torch

torch.manual_seed(0)
op = kernel.taylor_linear_attention
reference = kernel.taylor_linear_attention_reference
q, k = torch.randn(2, 2, 50, 3, 8)
v = torch.randn(2, 50, 3, 16)
y = op.taylor_linear_attention(q, k, v)
exact = reference.taylor_linear_attention_reference(q.double(), k.double(), v.double())
assert (y - exact).norm() / exact.norm() < 1e-5
window = kernel.sliding_window_attention.sliding_window_attention(v, v, v, window=50)
full = torch.nn.functional.scaled_dot_product_attention(*[v.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
assert (window - full).norm() / full.norm() < 1e-5
assert "triton" not in sys.modules, "a CPU tensor does not load Triton"
triton_form = op.taylor_linear_attention(q, k, v, backend="triton")
assert (triton_form - exact).norm() / exact.norm() < 1e-3
layer = kernel.layers.BasedTaylorLinearAttention()
assert torch.equal(layer(q, k, v), y)
print("loaded", Path(kernel.__file__).parent)
"""


@needs_kernels
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("where", ["built", "sources", "project"])
def test_local_kernel_loads_and_computes_what_the_twin_does(where, built, tmp_path):
    if where == "project" and not LINK.is_symlink():
        pytest.skip("only a checkout holds the link kernels/torch-universal")
    path = {"built": built, "sources": FOLDER, "project": KERNELS}[where]
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    assert "loaded" in run_python(LOAD, str(path), cwd=tmp_path, **interpret)


@needs_kernels
def test_kernel_and_geobased_share_a_process(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
import geobased
from geobased.kernels.gated_short_convolution import gated_short_convolution
from kernels import get_local_kernel

other = get_local_kernel(Path(sys.argv[1])).gated_short_convolution.gated_short_convolution
x, gate, weight = torch.randn(1, 9, 4), torch.randn(1, 9, 4), torch.randn(4, 3)
assert other is not gated_short_convolution
for backend in ("torch", "triton") if "triton" in sys.argv else ("torch",):
    torch.testing.assert_close(
        other(x, gate, weight, backend=backend), gated_short_convolution(x, gate, weight, backend=backend)
    )
print("same")
"""
    backends = ["triton"] if importlib.util.find_spec("triton") and not torch.cuda.is_available() else []
    assert "same" in run_python(code, str(FOLDER), *backends, cwd=tmp_path, TRITON_INTERPRET="1")


@needs_kernels
@pytest.mark.parametrize("name", LAYERS.values())
def test_kernelize_accepts_the_layer(name):
    from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

    @use_kernel_forward_from_hub(name)
    class Host(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    layer = getattr(get_local_kernel(FOLDER).layers, name)
    training = Mode.TRAINING if layer.has_backward else Mode.INFERENCE
    with use_kernel_mapping({name: {"cpu": LocalLayerRepository(FOLDER, layer_name=name)}}):
        host = kernelize(Host(), mode=training | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert host.forward.__func__ is layer.forward


@needs_kernels
def test_layers_have_gradients():
    from kernels import get_local_kernel

    layers = get_local_kernel(FOLDER).layers
    assert sorted(layers.__all__) == sorted(LAYERS.values())
    q, k = torch.randn(2, 1, 20, 2, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 20, 2, 4, dtype=torch.float64, requires_grad=True)
    layers.BasedTaylorLinearAttention()(q, k, v).sum().backward()
    assert v.grad is not None and v.grad.abs().sum() > 0
    x = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    layers.BasedGatedShortConvolution()(x, x, torch.randn(6, 3, dtype=torch.float64)).sum().backward()
    layers.BasedSlidingWindowAttention()(v, v, v, window=5).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


# A model as somebody without geobased loads it: its code comes from the model's folder.
STRANGER = """
import logging, sys
from pathlib import Path

sys.modules["geobased"] = None
import torch
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from transformers import AutoModelForCausalLM

model_folder, kernel_folder, *names = sys.argv[1:]
ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def load(**options):
    return AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def results(model):
    return model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)


def functions(model):
    module = sys.modules[type(model).__module__.rpartition(".")[0] + ".mixers_based"]
    return [getattr(module, name) for name in names]


def report(model):
    print("same", all(torch.equal(a, b) for a, b in zip(results(model), plain, strict=True)))
    print("origins", *{function.forward.__func__.__module__.partition(".")[0] for function in functions(model)})


plain = results(load())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Folder of a random model (one layer of each mixer) with its code."""
    from geobased import BasedConfig, BasedForCausalLM
    from geobased.modeling_based.export import export_model

    config = BasedConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        feature_dim=8,
        sliding_window=16,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return export_model(BasedForCausalLM(config), tmp_path_factory.mktemp("export") / "my-based")


@needs_use_kernels
def test_use_kernels_takes_the_local_kernel(exported, built, tmp_path):
    code = (
        STRANGER
        + f"""
mapping = {{
    layer: {{"cpu": LocalLayerRepository(Path(kernel_folder), layer_name=layer)}} for layer in {sorted(LAYERS.values())}
}}
with use_kernel_mapping(mapping):
    model = load(use_kernels=True)
report(model)
"""
    )
    output = run_python(code, str(exported), str(built), *LAYERS, cwd=tmp_path)
    assert "same True" in output
    assert "origins _geobased_kernels_" in output


@needs_use_kernels
def test_use_kernels_changes_nothing_on_the_cpu(exported, tmp_path):
    output = run_python(STRANGER + "report(load(use_kernels=True))", str(exported), "", *LAYERS, cwd=tmp_path)
    assert "same True" in output


# as on a machine with a GPU: what the mapping for CUDA says is loaded, the model itself stays on the CPU
ON_CUDA = (
    STRANGER
    + """
import kernels.layer.repos
from transformers.integrations.hub_kernels import register_kernel_mapping_transformers

kernels.layer.repos._find_capability = lambda: 90
register_kernel_mapping_transformers()
model = load()
kernelize(model, mode=Mode.INFERENCE, device="cuda")
report(model)
"""
)


@needs_use_kernels
def test_unreachable_hub_leaves_plain_functions_and_says_why(exported, tmp_path):
    output = run_python(ON_CUDA, str(exported), "", *LAYERS, cwd=tmp_path, HF_HOME=str(tmp_path / "empty"))
    assert "same True" in output
    assert output.count("could not be loaded") == 1
    assert "Reason: Version 1 of 'geobased/geobased-kernels'" in output


@needs_use_kernels
def test_hub_mapping_takes_a_local_folder_from_the_environment(exported, built, tmp_path):
    local = f"geobased/geobased-kernels={built}"
    output = run_python(ON_CUDA, str(exported), "", *LAYERS, cwd=tmp_path, LOCAL_KERNELS=local)
    assert "same True" in output
    assert "origins _geobased_kernels_" in output
    assert "could not be loaded" not in output


@needs_use_kernels
def test_use_kernels_is_accepted_where_geobased_is_installed(exported):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 30)[None]
    model = AutoModelForCausalLM.from_pretrained(exported, use_kernels=True)
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert model.use_kernels
    assert torch.equal(model(ids).logits, plain(ids).logits)


@needs_use_kernels
def test_card_names_layers_that_the_model_has(exported, tmp_path):
    card = (KERNELS / "CARD.md").read_text(encoding="utf-8")
    named = re.search(r"layers = \(\n(.*?)\n\)", card, re.DOTALL).group(1)
    assert [line.strip(' ",') for line in named.splitlines()] == sorted(LAYERS.values())
    code = (
        STRANGER
        + f"""
from transformers import KernelConfig

source = {{"version": 1, "trust_remote_code": True}}
config = KernelConfig({{name: (f"geobased/geobased-kernels:{{name}}", source) for name in {sorted(LAYERS.values())}}})
config.sanitize_kernel_mapping(load())
print("registered", *sorted(set(config.registered_layer_names.values())))
"""
    )
    output = run_python(code, str(exported), "", *LAYERS, cwd=tmp_path)
    assert "registered " + " ".join(sorted(LAYERS.values())) in output
