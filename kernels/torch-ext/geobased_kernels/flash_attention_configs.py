"""Launch configurations of the softmax attention kernels, as data: the fastest of a sweep on an H200.

TILE rows (queries forward and for dq, keys for dk and dv) stay in a program while STEP rows at a time pass by. All fit the
99 KB of shared memory that a program has on every GPU from sm_80 on.
"""

from typing import Any

import torch

Config = dict[str, Any]


def _config(
    tile: int,
    step: int,
    num_warps: int,
    num_stages: int,
    *,
    mask_all: bool = False,
    heads_first: bool = False,
    precision: str = "ieee",
    **options: int,
) -> Config:
    if torch.version.cuda is None:
        options.pop("maxnreg", None)  # an option of Triton's CUDA backend alone
    return dict(
        TILE=tile,
        STEP=step,
        MASK_ALL=mask_all,
        HEADS_FIRST=heads_first,
        PRECISION=precision,
        num_warps=num_warps,
        num_stages=num_stages,
        **options,
    )


def _window(*sizes: int, **options: Any) -> Config:
    return _config(*sizes, heads_first=True, **options)


# float32 products as three tf32 ones: 3e-7 from float64, three times as fast as without tensor cores
def _float32(*sizes: int, **options: Any) -> Config:
    return _config(*sizes, precision="tf32x3", **options)


# (kernel, windowed, bytes of an element, head_dim up to); "short": at most SHORT queries; "long": more than LONG keys.
# maxnreg makes room for one more program on each multiprocessor where that pays.
CONFIGS: dict[tuple[str, bool, int, int], Config] = {
    ("forward", True, 2, 64): _window(64, 64, 4, 3, maxnreg=128),
    ("forward", True, 2, 128): _window(64, 32, 4, 3, mask_all=True),
    ("dq", True, 2, 64): _window(64, 32, 4, 3),
    ("dq", True, 2, 128): _window(64, 32, 4, 2, mask_all=True),
    ("dkdv", True, 2, 64): _window(64, 32, 4, 3, maxnreg=168),
    ("dkdv", True, 2, 128): _window(64, 32, 4, 3),
    ("forward", False, 2, 64): _config(64, 64, 4, 3, maxnreg=128),
    ("forward", False, 2, 128): _config(64, 32, 4, 3),
    ("dq", False, 2, 64): _config(64, 32, 4, 3),
    ("dq", False, 2, 128): _config(64, 64, 4, 2),
    ("dkdv", False, 2, 64): _config(64, 32, 4, 3, maxnreg=168),
    ("dkdv", False, 2, 128): _config(64, 32, 4, 3),
    ("long dq", False, 2, 64): _config(128, 64, 8, 3),
}
for windowed in (True, False):
    CONFIGS |= {
        ("forward", windowed, 4, 64): _float32(64, 32, 4, 1, heads_first=windowed),
        ("forward", windowed, 4, 128): _float32(64, 32, 4, 1, heads_first=windowed),
        ("dq", windowed, 4, 64): _float32(64, 64, 4, 1, heads_first=windowed),
        ("dq", windowed, 4, 128): _float32(32, 16, 4, 1, heads_first=windowed),
        ("dkdv", windowed, 4, 64): _float32(64, 32, 4, 1, heads_first=windowed),
        ("dkdv", windowed, 4, 128): _float32(32, 16, 4, 1, heads_first=windowed),
        ("short forward", windowed, 2, 64): _config(16, 64, 4, 3, mask_all=windowed, heads_first=windowed),
        ("short forward", windowed, 2, 128): _config(16, 64, 4, 2, mask_all=windowed, heads_first=windowed),
    }
SHORT = 16
LONG = 1024


def launch_config(kernel: str, q: torch.Tensor, *, windowed: bool, kv_len: int = 0) -> Config:
    """kernel "forward", "dq" or "dkdv"."""
    key = (windowed, q.element_size(), 64 if q.shape[-1] <= 64 else 128)
    length = "short " if q.shape[1] <= SHORT else "long " if kv_len > LONG else ""
    return CONFIGS.get((length + kernel, *key)) or CONFIGS[(kernel, *key)]
