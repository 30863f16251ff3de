"""A name for weights: equal exactly when names, formats, shapes and every bit are."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from agentopt.weights.load import need

_CHUNK = 1 << 24


def fingerprint(tensors: Iterable[tuple[str, Any]]) -> str:
    """BLAKE2b over names, dtypes, shapes and raw bytes, in the order given, as 32 hexadecimal digits.

    The device does not matter, nor whether a tensor is a view. At most 16 MB are copied at a time.

    Args:
        tensors: pairs of name and tensor, such as `model.named_parameters()`.
    """
    torch = need("torch")
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        data = tensor.detach()
        head = f"{name}\0{str(data.dtype).removeprefix('torch.')}\0{list(data.shape)}\0"
        digest.update(len(head.encode()).to_bytes(8, "little") + head.encode())
        flat = data.reshape(-1)  # a view wherever strides allow
        step = max(1, _CHUNK // max(1, flat.element_size()))
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].cpu().contiguous().view(torch.uint8)
            digest.update(memoryview(part.numpy()))
    return digest.hexdigest()


def names_fingerprint(names: Iterable[str]) -> str:
    """The same for a list of names: which weights are tuned, and in which order."""
    digest = blake2b(digest_size=16)
    for name in names:
        digest.update(len(name.encode()).to_bytes(8, "little") + name.encode())
    return digest.hexdigest()
