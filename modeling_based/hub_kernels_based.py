# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels from the Hub for a model that runs without geobased: `from_pretrained(..., use_kernels=True)`.

Where geobased is installed its Triton kernels run by themselves and nothing here is used. Where it is not, the model's plain
PyTorch functions are marked with the names of layers in the kernels' repository; transformers' `use_kernels=True` (package
`kernels`) then puts those in their place on a CUDA or ROCm device. The functions are shared by all BASED models of the
process. What cannot be loaded (no network, no build, a publisher that `kernels` does not trust) stays plain PyTorch, with
one warning that gives the reason. transformers' `kernel_config=` says which other kernels to take and whom to trust, and the
variable `LOCAL_KERNELS=geobased/geobased-kernels=PATH` takes these from a folder.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.integrations.hub_kernels import use_kernel_forward_from_hub, use_kernelized_func
from transformers.utils import logging
from transformers.utils.import_utils import is_kernels_available

try:
    from kernels import get_kernel, register_kernel_mapping
except ImportError:
    get_kernel = register_kernel_mapping = None

logger = logging.get_logger(__name__)

REPOSITORY, VERSION = "geobased/geobased-kernels", 1
DEVICES = ("cuda", "rocm")  # on others the kernels' own functions are plain PyTorch too


class HubLayer:
    """Where `kernels` finds a layer: in the repository, or made of the plain function where that cannot be loaded."""

    def __init__(self, layer_name: str, function: Callable[..., Any]):
        self.layer_name, self.function = layer_name, function

    def load(self) -> type[nn.Module]:
        try:
            return getattr(get_kernel(REPOSITORY, version=VERSION).layers, self.layer_name)
        except Exception as error:  # each version of `kernels` and of the Hub's client has its own
            logger.warning_once(
                f"The kernels of {REPOSITORY} could not be loaded; this model keeps its slower plain PyTorch functions."
                f" Installing geobased brings the same kernels. Reason: {error}"
            )
            return _plain_layer(self.function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HubLayer) and (self.layer_name, self.function) == (other.layer_name, other.function)

    def __hash__(self) -> int:
        return hash((self.layer_name, self.function))

    def __str__(self) -> str:
        return f"`{REPOSITORY}` (version {VERSION}), layer `{self.layer_name}`"


def _plain_layer(function: Callable[..., Any]) -> type[nn.Module]:
    class PlainLayer(nn.Module):
        can_torch_compile = True
        has_backward = True

        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    return PlainLayer


def replaceable_function(layer_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in a form that `use_kernels=True` can replace by the layer of that name; itself without `kernels`."""
    if register_kernel_mapping is None or not is_kernels_available():
        return function

    # Any arguments: `kernels` compares signatures, and the model's may grow parameters that a kernel's twin has not.
    def plain(*args, **kwargs):
        return function(*args, **kwargs)

    plain.__name__, plain.__doc__ = function.__name__, function.__doc__
    register_kernel_mapping({layer_name: {device: HubLayer(layer_name, function) for device in DEVICES}})
    return use_kernel_forward_from_hub(layer_name)(plain)


def with_replaceable(*functions: Callable[..., Any]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: the module calls these functions, which `kernelize` shall find there."""
    replaceable = [function for function in functions if hasattr(function, "kernel_layer_name")]
    return use_kernelized_func(replaceable) if replaceable else lambda cls: cls
