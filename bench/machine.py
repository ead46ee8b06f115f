"""What a benchmark says of the machine that it ran on, and the most memory that its process has held."""

import os
import platform
import resource
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    """Processor, cores, threads, memory, versions."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    facts: dict[str, object] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def peak_bytes(device: torch.device) -> int:
    """Peak resident memory of this process, or on a GPU what was allocated there at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
