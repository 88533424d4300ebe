"""From what a user calls a model to a loaded one, with a sentence for everything that can be wrong on the way."""

import contextlib
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from geobased.checkpoints import checkpoint_path, shipped_checkpoints

from .errors import BAD_INPUT, FAILURE, CommandError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL, DEFAULT_GEOLOCALIZER = "based-mini", "earthclip-mini"
# what names them on a Space, which has no command line
MODEL_VARIABLE, GEOLOCALIZER_VARIABLE = "GEOBASED_DEMO_MODEL", "GEOBASED_GEOLOCALIZATION_MODEL"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model", "sentencepiece*")
HUB_TIMEOUT_SECONDS = 3.0


def resolve_model(model: str) -> str:
    """A folder, the folder of a shipped checkpoint, or a Hub id as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise CommandError(f"{model} is a file: give the folder that holds config.json and the weights")
    if model in shipped_checkpoints():
        return checkpoint_path(model)
    if model in (DEFAULT_MODEL, DEFAULT_GEOLOCALIZER):
        raise CommandError(f"the checkpoint {model} is missing from this installation: give --model a folder or a Hub id")
    check_hub_id(model)
    return model


def check_hub_id(model: str) -> None:
    if not HUB_ID.fullmatch(model):
        raise CommandError(f"there is no folder {model!r}, and it is no Hub id (owner/name) either")


def hub_is_reachable() -> bool:
    """Whether the Hub answers, told within seconds; the client's own retries would take half a minute."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return False
    url = urlsplit(constants.ENDPOINT)
    if url.scheme in urllib.request.getproxies():
        return True  # only the proxy can tell
    answered = threading.Event()

    def connect() -> None:
        address = (url.hostname, url.port or (443 if url.scheme == "https" else 80))
        with contextlib.suppress(OSError), socket.create_connection(address, HUB_TIMEOUT_SECONDS):
            answered.set()

    # in a thread because looking up a name has no time limit of its own
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def offline_if(unreachable: bool) -> Iterator[None]:
    """Within this context the Hub client reads its cache only, without trying the network first."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or unreachable
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within this context transformers neither logs warnings nor draws progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def loading(model: str, source: str) -> Iterator[None]:
    """Turns whatever reading a checkpoint raises into a sentence that names the model.

    Args:
        model: what the user called it.
        source: what `resolve_model` made of that.
    """
    local = Path(source).is_dir()
    unreachable = not local and not hub_is_reachable()
    if local:
        _check_folder(model, Path(source))
    try:
        with offline_if(unreachable), quiet_transformers():
            yield
    except (CommandError, ModuleNotFoundError, FileExistsError, PermissionError):
        raise
    except Exception as error:  # readers of JSON, pickles, safetensors and the Hub client each raise their own types
        sentence, code = _explain_loading(model, local, unreachable, error)
        raise CommandError(sentence, code) from error


def _check_folder(model: str, folder: Path) -> None:
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise CommandError(f"{model} has no config.json: it is not the folder of a saved model")


def _explain_loading(model: str, local: bool, unreachable: bool, error: Exception) -> tuple[str, int]:
    import torch
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    message = one_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{model} does not fit into memory: {message}", FAILURE
    if isinstance(error, SafetensorError):
        return f"the weights of {model} cannot be read: the file is damaged or incomplete ({message})", BAD_INPUT
    if isinstance(error, RuntimeError) and "mismatch" in message:
        return f"the weights of {model} do not fit its config.json: they are of different models", BAD_INPUT
    if "trust_remote_code=True" in message:
        what = f"{model} is of a type that transformers does not know and brings code of its own"
        return f"{what}: if you trust it, `geobased generate` runs it with --trust-remote-code", BAD_INPUT
    if isinstance(error, ValueError):
        return message if model in message else f"{model}: {message}", BAD_INPUT
    if local:
        return f"{model} cannot be loaded: {message}", BAD_INPUT
    if unreachable:
        return not_cached(model), FAILURE
    causes = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{model} is a gated model: accept its conditions on the Hub and log in with `hf auth login`", BAD_INPUT
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"the Hub has no model {model} that you may read: check the name, or log in with `hf auth login`", BAD_INPUT
    return f"{model} cannot be loaded from the Hub: {message}", FAILURE


def not_cached(model: str) -> str:
    """Why a model that is no folder cannot be had without the network, and what to do."""
    from huggingface_hub import constants, is_offline_mode

    why = "HF_HUB_OFFLINE forbids downloading it" if is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
    shipped = ", ".join(shipped_checkpoints()) or "none in this installation"
    return (
        f"the model {model} is neither a folder nor in the Hugging Face cache ({constants.HF_HUB_CACHE}), and {why}:"
        f" check the name or the network, or use a folder or a checkpoint that ships with geobased ({shipped})"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def load_tokenizer(model: str, source: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer saved with a model."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(source)
    with loading(model, source):
        if (folder / "config.json").is_file():
            # first, so that a checkpoint in another format is reported as that and not as one without a tokenizer
            AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_PATTERNS):
            raise CommandError(f"{model} has no tokenizer: copy the tokenizer that the model was trained with into the folder")
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_model(model: str, source: str, dtype: str, device: "torch.device", trust_remote_code: bool = False) -> "PreTrainedModel":
    """The causal language model on its device, refused where weights are missing.

    dtype "auto" is that of the checkpoint, but float32 instead of a half precision on the CPU, where that is faster.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted: torch.dtype | str = parse_dtype(dtype)
    with loading(model, source):
        if wanted == "auto" and device.type == "cpu" and not Path(source, "adapter_config.json").is_file():
            stored = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).dtype
            wanted = torch.float32 if stored in (None, torch.float16, torch.bfloat16) else wanted
        pair: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, output_loading_info=True, trust_remote_code=trust_remote_code
        )
        loaded, report = pair
        if missing := sorted(report["missing_keys"]):
            raise CommandError(
                f"{model} lacks {len(missing)} weights that its config.json asks for, among them {missing[0]}:"
                " the checkpoint is incomplete"
            )
        return loaded.to(device).eval()


def parse_dtype(dtype: str) -> "torch.dtype | str":
    """The floating point dtype of that name, or "auto"."""
    import torch

    names = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in names:
        raise CommandError(f"--dtype {dtype!r} is not one of auto, {', '.join(names)}")
    return names.get(dtype, dtype)


def parse_device(device: str) -> "torch.device":
    """The device of that name; "auto" is a GPU where there is one."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise CommandError(f"--device {device!r} is not available here; there is: {available}") from error
    return found


def cache_folder() -> str:
    from huggingface_hub import constants

    return os.fspath(constants.HF_HUB_CACHE)
