"""Launch configurations of the Taylor linear attention kernels: data, measured on an H200, and a rule for all other shapes."""

import torch

ROW_GRANULE = 32  # rows of stored states are padded to a multiple of it

CHUNK = 256  # tokens whose keys share one stored state
WALK_PROGRAMS = 700  # with as many programs as this a GPU is full, and a scan over chunks saves nothing

# kernel -> (head_dim up to, options), for bfloat16
LAUNCH = {
    "states": [(128, dict(BLOCK_P=64, BLOCK_T=64, NUM_STAGES=3, num_warps=4))],
    "output": [(128, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32, NUM_STAGES=3, num_warps=4))],
    # with padding: registers held to what the kernel needs without, or the rare chunks with padding would slow down all others
    "masked_output": [
        (64, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32, NUM_STAGES=3, num_warps=4, maxnreg=128)),
        (128, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32, NUM_STAGES=3, num_warps=4, maxnreg=168)),
    ],
    "delta": [(128, dict(BLOCK_M=32, num_warps=4))],
    "dq": [
        (64, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32, NUM_STAGES=3, num_warps=4)),
        (128, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32, NUM_STAGES=1, num_warps=4)),
    ],
    "dkv": [
        (64, dict(BLOCK_M=64, BLOCK_N=32, BLOCK_P=32, NUM_STAGES=2, num_warps=4)),
        (128, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32, NUM_STAGES=3, num_warps=4)),
    ],
}
# float16 multiplies as tf32 (its sums can leave its range): larger elements, smaller tiles
FLOAT16_LAUNCH = {
    "states": [
        (64, dict(BLOCK_P=64, BLOCK_T=32, NUM_STAGES=1, num_warps=4)),
        (128, dict(BLOCK_P=32, BLOCK_T=32, NUM_STAGES=2, num_warps=4)),
    ],
    "output": [
        (64, dict(BLOCK_M=64, BLOCK_N=32, BLOCK_P=32, NUM_STAGES=1, num_warps=4)),
        (128, dict(BLOCK_M=32, BLOCK_N=32, BLOCK_P=32, NUM_STAGES=2, num_warps=4)),
    ],
    "delta": [(128, dict(BLOCK_M=32, num_warps=4))],
}
FLOAT16_LAUNCH["masked_output"] = FLOAT16_LAUNCH["dq"] = FLOAT16_LAUNCH["dkv"] = FLOAT16_LAUNCH["output"]
# no tensor cores
FLOAT32_LAUNCH = {
    "states": [(128, dict(BLOCK_P=32, BLOCK_T=32, NUM_STAGES=1, num_warps=8))],
    "output": [(128, dict(BLOCK_M=32, BLOCK_N=32, BLOCK_P=32, NUM_STAGES=1, num_warps=8))],
    "delta": [(128, dict(BLOCK_M=32, num_warps=4))],
}
FLOAT32_LAUNCH["masked_output"] = FLOAT32_LAUNCH["dq"] = FLOAT32_LAUNCH["dkv"] = FLOAT32_LAUNCH["output"]
TABLES = {torch.bfloat16: LAUNCH, torch.float16: FLOAT16_LAUNCH, torch.float32: FLOAT32_LAUNCH}


def launch_options(kernel: str, dtype: torch.dtype, feature_dim: int, head_dim: int) -> dict:
    options = dict(next(options for limit, options in TABLES[dtype][kernel] if head_dim <= limit))
    if torch.version.cuda is None:
        options.pop("maxnreg", None)  # an option of Triton's CUDA backend alone
    if feature_dim > 16 and kernel in ("dq", "dkv"):
        # with loads that run ahead, Triton 3.6's code for these wide tiles reads beyond its shared memory, and dk is wrong
        return options | {"NUM_STAGES": 1}
    return options


def walks_sequences(even: bool, sequences: int, chunks: int, heads: int, row_tiles: int) -> bool:
    """Whether one program sums a whole sequence, which saves the scan: for many sequences of one length."""
    return chunks == sequences or (even and sequences * heads * row_tiles >= WALK_PROGRAMS)


def scan_options(total_rows: int) -> dict:
    """One long sequence must be cut into small blocks to fill a GPU, with many loads on the way to each; many short ones run best
    in larger blocks."""
    if total_rows >= 16 * 1024:
        return dict(BLOCK_P=16, NUM_STAGES=4, num_warps=4)
    return dict(BLOCK_P=8, NUM_STAGES=8, num_warps=1)
