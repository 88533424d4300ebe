"""The kernels' folder works as a Hub kernel does: loaded by path, under another name, with geobased out of reach."""

import subprocess
import sys
import tomllib
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent
FOLDER = KERNELS / "torch-ext" / "geobased_kernels"

SCRIPT = """
import importlib.util
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("geobased", "transformers"):
            raise ImportError(f"the kernels must not import {name}")


sys.meta_path.insert(0, Refuse())
import torch

folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("loaded_by_path", folder + "/__init__.py", submodule_search_locations=[folder])
module = importlib.util.module_from_spec(spec)
sys.modules["loaded_by_path"] = module
spec.loader.exec_module(module)

from loaded_by_path.gated_short_convolution import gated_short_convolution
from loaded_by_path.sliding_window_attention import sliding_window_attention
from loaded_by_path.taylor_linear_attention import taylor_linear_attention, taylor_linear_attention_step

torch.manual_seed(0)
q, k = torch.randn(2, 2, 33, 3, 8, dtype=torch.float64)
v = torch.randn(2, 33, 3, 5, dtype=torch.float64)
y, state = taylor_linear_attention(q, k, v, output_final_state=True)
prefix, running = taylor_linear_attention(q[:, :-1], k[:, :-1], v[:, :-1], output_final_state=True)
last = taylor_linear_attention_step(q[:, -1], k[:, -1], v[:, -1], running)
torch.testing.assert_close(last, y[:, -1])
torch.testing.assert_close(running, state)
torch.testing.assert_close(prefix, y[:, :-1])

full = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, q)), is_causal=True)
torch.testing.assert_close(sliding_window_attention(q, k, q, window=33), full.transpose(1, 2))

x, gate = torch.randn(2, 2, 33, 6, dtype=torch.float64)
weight = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(6, 3)
torch.testing.assert_close(gated_short_convolution(x, gate, weight), torch.nn.functional.silu(x) * gate)
print("ok", "triton" in sys.modules)
"""


def test_folder_loads_by_path_without_geobased(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["ok", "False"]  # nor does a CPU tensor load Triton


def test_build_file_names_the_folder():
    build = tomllib.loads((KERNELS / "build.toml").read_text(encoding="utf-8"))
    assert build["general"]["name"].replace("-", "_") == FOLDER.name
    assert "torch-noarch" in build


def test_ops_load_on_first_use():
    script = """
import sys
import geobased.kernels as kernels

op = kernels.taylor_linear_attention
assert op.__name__ == "geobased.kernels.taylor_linear_attention" and callable(op.taylor_linear_attention)
assert {"flash_attention", "layers", "silu_mul"} <= set(kernels.__all__) <= set(dir(kernels))
assert not any(name.endswith("_triton") for name in kernels.__all__)
assert not hasattr(kernels, "no_such_op")
print(*[name for name in sys.modules if name.startswith("geobased.kernels.") and name.endswith("_triton")])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=FOLDER.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
