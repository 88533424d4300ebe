"""What a training run leaves behind: the log, the loss curve and the final model, each written whole or not at all."""

import copy
import importlib.util
import json
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from geobased.modeling_based.whole_folder import whole_folder
from geobased.whole_file import whole_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def versions() -> dict[str, str]:
    """Versions that a result depends on, and the device's name."""
    import accelerate

    from geobased import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "geobased": __version__,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "absent",
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def load_results(output_dir: str | Path, hint: str = "run the experiment first") -> dict[str, Any]:
    """What the `results.json` of an experiment's folder holds. Raises `FileNotFoundError`, with the hint, where there is none."""
    path = Path(output_dir, "results.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    return json.loads(path.read_text(encoding="utf-8"))


def save_model_folder(
    model: PreTrainedModel, parts: Sequence[Any], folder: str | Path, dtype: str = "float32", card: str | None = None
) -> Path:
    """Save a model with what belongs to it into a folder that appears only when complete; an older one is replaced.

    Args:
        parts: tokenizer, image processor and the like: what has `save_pretrained`.
        dtype: "float32" or "bfloat16", of the stored weights; the model itself is left as it is.
        card: text of README.md, if there shall be one.
    """
    folder = Path(folder)
    with whole_folder(folder) as temporary:
        copy.deepcopy(model).to("cpu", DTYPES[dtype]).save_pretrained(temporary)  # type: ignore[arg-type]
        for part in parts:
            part.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        # safetensors leaves what only its owner can read
        for path in temporary.iterdir():
            path.chmod(0o644)
    return folder


def plot_losses(history: list[dict[str, float]], path: str | Path) -> bool:
    """Draw training and validation losses (nats per token) over steps; False, with a warning, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("no loss curve: matplotlib is not installed (pip install geobased[train])", stacklevel=2)
        return False
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key == "loss" or (key.startswith("eval_") and key.endswith("loss")):
                curves.setdefault(key.removesuffix("_loss").removeprefix("eval_"), []).append((entry["step"], value))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        label = "training" if name == "loss" else name.replace("_", " ")
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="" if name == "loss" else ".")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def save_figure(figure: Any, path: str | Path, colours: int = 256) -> None:
    """Save a figure of matplotlib, drawn by Agg, as a PNG with a palette: a quarter of the bytes of one without."""
    from PIL import Image

    figure.set_dpi(150)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    with whole_file(path) as temporary:
        picture.quantize(colours, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)


__all__ = ["DTYPES", "load_results", "plot_losses", "save_figure", "save_model_folder", "versions", "write_json"]
