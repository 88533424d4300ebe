"""Bytes that are the same wherever the same thing is written down, and their digests."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def audit_package(name: str) -> Any:
    """A module of the extra `audit`. Raises `ModuleNotFoundError` that names the extra where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f'audits need {package}, which is not installed: pip install "geobased[audit]"', name=package
        ) from error


def canonical_json(value: Any) -> bytes:
    """RFC 8785 (JSON Canonicalization Scheme). Raises `ValueError` for what it cannot hold, such as NaN."""
    return audit_package("rfc8785").dumps(value)


def read_json(text: str | bytes) -> Any:
    """Raises `ValueError` also for what only Python reads (NaN, Infinity) and for names that occur twice."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice in a JSON object")
        return found

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def safetensors_head(content: bytes) -> dict[str, Any]:
    """What a safetensors file says of its tensors, and its metadata. Raises `ValueError` for other content."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= len(content) - 8:
        raise ValueError("this is no safetensors file")
    return read_json(content[8 : 8 + length])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: str | Path) -> dict[str, str]:
    """Digest of every file under a folder, by its path in it; links are followed, as snapshots of the Hub consist of them."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def message_sha256(header: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of JSON values with tensors: of the canonical JSON, then of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(canonical_json(header))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = [
    "audit_package",
    "canonical_json",
    "file_sha256",
    "folder_sha256",
    "message_sha256",
    "read_json",
    "safetensors_head",
    "sha256",
]
