"""What importing geobased loads, costs and registers."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("triton", "gradio", "matplotlib", "trl", "peft", "datasets", "geopandas", "sklearn", "scipy", "torchvision")


def run_python(code: str, cwd: Path) -> str:
    """Output of `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def packages() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser["options"]["packages"].split()


def test_import_loads_nothing_heavy(tmp_path):
    # transformers itself may import some of them where they are installed: only what geobased adds counts
    code = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
before = {name.partition(".")[0] for name in sys.modules}
import geobased
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - before)))
"""
    added = json.loads(run_python(code, tmp_path))
    assert not set(added) & set(HEAVY)


def test_import_costs_what_a_model_of_transformers_costs(tmp_path):
    def cpu_seconds(statement: str) -> float:
        # CPU time, least of two: other tests run at the same time, and a first import writes bytecode
        code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
        return min(float(run_python(code, tmp_path)) for _ in range(2))

    theirs = cpu_seconds("from transformers import AutoModelForCausalLM, LlamaForCausalLM")
    ours = cpu_seconds("import geobased")
    assert ours < 1.5 * theirs


def test_every_module_imports(tmp_path):
    # modules that hold Triton kernels need Triton, an extra, and SuperHF's need TRL; their own tests import them
    code = f"""
import importlib, importlib.util, pkgutil
left_out = () if importlib.util.find_spec("trl") else ("geobased.training.superhf_",)
for package in {packages()}:
    module = importlib.import_module(package)
    for found in pkgutil.iter_modules(module.__path__, package + "."):
        if not found.name.endswith(("_triton", "__main__")) and not found.name.startswith(left_out):
            importlib.import_module(found.name)
print("ok")
"""
    assert run_python(code, tmp_path) == "ok"


def test_import_works_in_the_root_of_the_repository():
    # the folder `kernels` beside the current directory must not be taken for the package of that name
    assert run_python("import geobased; print(geobased.__version__)", ROOT)


def test_models_are_registered(tmp_path):
    code = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
import geobased
config = AutoConfig.for_model(
    "based", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, feature_dim=4
)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    print(type(auto.from_config(config)).__name__)
"""
    assert run_python(code, tmp_path).split() == ["BasedModel", "BasedForCausalLM", "BasedForSequenceClassification"]


def test_public_names_exist():
    import geobased

    for name in geobased.__all__:
        assert getattr(geobased, name) is not None


def test_unknown_checkpoint_names_those_there_are():
    import geobased

    with pytest.raises(ValueError, match="no checkpoint named 'nowhere'"):
        geobased.checkpoint_path("nowhere")
