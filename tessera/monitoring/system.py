"""`tessera doctor --system`: what is installed, what each missing extra would give, and whether the devices work."""

import os
import platform
import shutil
import sys
from importlib import metadata, util
from pathlib import Path

import torch

from tessera import __version__, runtime
from tessera.errors import TesseraError
from tessera.reporting.text import format_bytes

# What each extra of pyproject.toml gives, and the modules that it installs.
EXTRAS = {
    "demo": ("the digits data set", ["sklearn"]),
    "data": ("data sets of the Hugging Face hub", ["datasets"]),
    "diffusers": ("autoencoders, and folders of diffusers", ["diffusers"]),
    "gcs": ("data and runs in gs://", ["gcsfs"]),
    "hub": ("data of the Hugging Face hub in hf://", ["huggingface_hub"]),
    "ray": ("tessera serve --replicas, --launch ray", ["ray", "httpx", "fastapi"]),
    "slurm": ("--launch slurm", ["submitit"]),
    "serve": ("tessera serve, and its page", ["fastapi", "uvicorn", "prometheus_client", "multipart"]),
    "storage": ("data and runs in buckets", ["fsspec", "s3fs"]),
    "tensorboard": ("training curves in TensorBoard", ["tensorboard"]),
    "text": ("pretrained text encoders", ["transformers", "sentencepiece", "google.protobuf"]),
    "video": ("videos: .mp4, .webm, ...", ["av"]),
    "vision": ("pretrained vision networks as feature extractors", ["transformers"]),
}


def describe_system() -> str:
    """A page about this installation and this machine. Each device computes a product that is compared with the CPU's.

    Nothing is downloaded, and nothing is written.
    """
    sections = {"Versions": _versions(), "Machine": _machine(), "Devices": _devices(), "Extras": _extras()}
    width = max(len(name) for rows in sections.values() for name in rows) + 2
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{width}}{value}" for name, value in rows.items())])
        for title, rows in sections.items()
    )


def _versions() -> dict[str, str]:
    names = ("torch", "numpy", "pydantic", "safetensors", "diffusers", "transformers")
    versions = {name: version for name in names if (version := _version(name))}
    return {"tessera": __version__, "python": platform.python_version(), **versions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    rows = {"system": f"{platform.system()} {platform.machine()}", "CPU cores": f"{runtime.available_cpus()}"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        rows["memory"] = format_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    rows["free disk here"] = format_bytes(shutil.disk_usage(Path.cwd()).free)
    return rows


def _devices() -> dict[str, str]:
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return {name: _check_device(name) for name in names}


def _check_device(name: str) -> str:
    """What a device is, and whether a product of matrices on it is right."""
    facts = ["float32"]
    try:
        device = runtime.choose_device(name)
        a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close((a.to(device) @ b.to(device)).cpu(), a @ b, rtol=1e-2, atol=1e-2)
        if runtime.autocast_dtype("auto", device) is torch.bfloat16:
            facts.append("bfloat16")
    except (TesseraError, RuntimeError, AssertionError) as error:
        return f"does not work: {' '.join(str(error).split())[:200]}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = [properties.name, format_bytes(properties.total_memory), *facts]
    return f"works: {', '.join(facts)}"


def _extras() -> dict[str, str]:
    """Each extra: what it gives, and how to install it where modules of it are missing."""
    rows = {}
    for name, (purpose, modules) in EXTRAS.items():
        missing = [module for module in modules if not _is_installed(module)]
        rows[name] = f"missing    {purpose}: pip install 'tessera[{name}]'" if missing else f"installed  {purpose}"
    return rows


def _is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    if module in sys.modules:
        return True
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False
