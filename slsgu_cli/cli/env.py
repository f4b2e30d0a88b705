"""`env`: versions, devices and extras, for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from slsgu_cli.cli.app import Session, command

# The packages of each extra, and their use.
EXTRAS = {
    "targets": (
        ("diffusers", "transformers"),
        "pipelines and LLaVA: search --target, generate, ask",
    ),
    "s3": (("s3fs",), "stores and sources on S3"),
    "download": (("img2dataset",), "build-sets --metadata"),
}
PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "numpy",
    "pyarrow",
    "zarr",
    "safetensors",
    "pillow",
    "fsspec",
    "matplotlib",
    "typer",
    "rich",
)


@command("env")
def env(session: Session) -> None:
    """Example: slsgu env --json"""
    import torch

    import slsgu_cli
    from slsgu_cli.clip.devices import device_name

    versions = [("python", platform.python_version()), ("system", platform.platform())]
    versions.append(("slsgu", slsgu_cli.__version__))
    versions += [(name, _version(name) or "missing") for name in PACKAGES]
    session.console.table("versions", ("package", "version"), versions, title="versions")
    devices = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    devices += [(f"cuda:{i}", device_name(f"cuda:{i}")) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(("mps", device_name("mps")))
    session.console.table("devices", ("device", "what"), devices, title="devices")
    extras = [
        (extra, name, _version(name) or "not installed", use)
        for extra, (names, use) in EXTRAS.items()
        for name in names
    ]
    columns = ("extra", "package", "version", "for")
    session.console.table("extras", columns, extras, title="extras: pip install 'slsgu[EXTRA]'")


def _version(package: str) -> str | None:
    """Return the version of an installed package; None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
