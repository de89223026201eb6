"""How much memory a device has left."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of a CUDA device with what torch has cached, else of the machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)
