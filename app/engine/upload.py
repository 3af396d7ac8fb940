"""From the host to the device without waiting for the device."""

from __future__ import annotations

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; on CUDA by a copy that nobody waits for.

    The caching host allocator keeps the pinned memory until the copy is done.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
