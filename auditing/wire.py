"""What passes between an auditor and a model: JSON values and tensors, in frames of JSON and safetensors. Nothing is pickled."""

import json
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import safetensors.torch
import torch

from .canonical import read_json

LENGTHS = struct.Struct("<QQ")
MAX_FRAME_BYTES = 1 << 34


@dataclass
class Message:
    """JSON values, and tensors by name."""

    header: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def write_message(stream: BinaryIO, message: Message) -> None:
    """Raises `TypeError` for a header that is no JSON."""
    header = json.dumps(message.header, allow_nan=False).encode()
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in message.tensors.items()}
    # safetensors refuses tensors that share memory
    tensors = safetensors.torch.save({name: tensor.clone() for name, tensor in plain.items()})
    stream.write(LENGTHS.pack(len(header), len(tensors)) + header)
    stream.write(tensors)
    stream.flush()


def read_message(stream: BinaryIO) -> Message | None:
    """The next message, or None at the end of the stream. Raises `ValueError` for what is no message."""
    start = stream.read(LENGTHS.size)
    if not start:
        return None
    if len(start) < LENGTHS.size:
        raise ValueError("the stream ends within a message")
    sizes = LENGTHS.unpack(start)
    if sum(sizes) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {sum(sizes):,} bytes is too large")
    parts = [stream.read(size) for size in sizes]
    if [len(part) for part in parts] != list(sizes):
        raise ValueError("the stream ends within a message")
    header = read_json(parts[0])
    if not isinstance(header, dict):
        raise ValueError("a message's header must be a JSON object")
    return Message(header, safetensors.torch.load(parts[1]))


__all__ = ["Message", "read_message", "write_message"]
