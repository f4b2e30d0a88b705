"""Devices of PyTorch by their names."""

from slsgu_cli.errors import UsageError


def pick_device(name: str) -> str:
    """Return the torch device for `auto` (cuda, else mps, else cpu), or check the named one.

    Each of several processes gets the GPU of its local rank. Raises UsageError.
    """
    import torch

    from slsgu_cli import processes

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    has = {"cuda": cuda, "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in has.items() if available)
    kind, _, number = name.partition(":")
    numbered = not number or number.isdecimal()
    known = numbered and int(number or 0) < max(1, torch.cuda.device_count())
    if not has.get(kind, False) or not known:
        usable = ", ".join(kind for kind, available in has.items() if available)
        raise UsageError(f"device {name} is not available here", hint=f"--device auto ({usable})")
    return processes.local_device(name) if kind == "cuda" else name


def device_name(device: str) -> str:
    """Return the name of a device to print with timings."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{device}, {torch.get_num_threads()} threads"
