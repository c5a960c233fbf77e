"""mmq doctor."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import mmq
from mmq.cli.errors import handled
from mmq.cli.options import Json, mode
from mmq.cli.output import Rows, make_output
from mmq.families.registry import families
from mmq.serve.vllm_families import support
from mmq.serve.vllm_plugin import GROUP, TARGET, Sources, State, inspect_vllm, vllm_version
from mmq.text import bytes_text

PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True)
class Capability:
    """How vLLM runs the parts of the checkpoint on devices from a compute capability on."""

    minimum: tuple[int, int]
    runs: str
    attention: str
    experts: str
    kv_cache: str


# Read in the sources of vLLM 0.32 and 0.33, not tried on each device. The first entry that a device reaches holds.
# Block W8A8 from 8.9; below it attention's scheme turns to weight-only kernels. Marlin's int4 experts and the
# weight-only scheme begin at 7.5. Of the fp8 KV cache's backends FlashInfer begins at 8.0, Triton at 8.9.
CAPABILITIES = (
    Capability((8, 9), "yes", "block fp8 W8A8", "int4 (Marlin)", "fp8 (FlashInfer, Triton)"),
    Capability((8, 0), "yes", "fp8 weight-only (Marlin, Humming)", "int4 (Marlin)", "fp8 (FlashInfer)"),
    Capability((7, 5), "without the fp8 KV cache", "fp8 weight-only (Marlin)", "int4 (Marlin)", "no backend for fp8"),
    Capability((0, 0), "no", "no kernel", "no kernel", "no backend for fp8"),
)


def doctor(json: Json = False) -> None:
    """Say what is installed, whether vLLM here can load the checkpoint, and which devices can run it."""
    with handled():
        output = make_output(mode(json, False))
        packages: dict[str, str | None] = {"python": platform.python_version(), "mmq": mmq.__version__}
        packages |= {name: _version(name) for name in PACKAGES}
        vllm = _vllm()
        devices, no_devices = _devices()
        found = {"packages": packages, "vllm": vllm, "devices": devices, "no_devices": no_devices}
        output.result(found, "mmq doctor", _rows(packages, vllm, devices, no_devices))
        if any(fault["state"] == State.PRESENT and not fault["mended_by_plugin"] for fault in vllm["faults"]):
            output.hint(
                "add mmq to the list in VLLM_PLUGINS"
                if vllm["plugin"]["installed"]
                else "install mmq in vLLM's environment, without its dependencies: pip install --no-deps ."
            )


def capability_of(major: int, minor: int) -> Capability:
    """The entry of the table for a compute capability."""
    return next(entry for entry in CAPABILITIES if (major, minor) >= entry.minimum)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _vllm() -> dict[str, Any]:
    """The vLLM of this environment, its faults, and whether it will call the plugin. vLLM is not imported."""
    names = {point.name for point in metadata.entry_points(group=GROUP) if point.value == TARGET}
    allowed = os.environ.get("VLLM_PLUGINS")
    # As vLLM reads it: unset means all plugins, else a list of names between commas.
    active = bool(names if allowed is None else names & set(allowed.split(",")))
    sources = Sources()
    return {
        "version": vllm_version(),
        "plugin": {"installed": bool(names), "active": active},
        "faults": [
            {
                "name": finding.fault.name,
                "sentence": finding.fault.sentence,
                "state": finding.state.value,
                "reason": finding.reason,
                "mended_by_plugin": active and finding.state in (State.PRESENT, State.MENDED),
            }
            for finding in inspect_vllm()
        ],
        "families": [asdict(support(sources, arch)) for arch in families().values()] if sources.folders else [],
    }


def _devices() -> tuple[list[dict[str, Any]], str]:
    """The CUDA devices that torch sees, and why there are none."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], f"torch can't be imported: {error}"
    if torch.version.hip is not None:
        return [], "torch is built for ROCm, of which mmq knows nothing"
    if not torch.cuda.is_available():
        return [], "torch sees no CUDA device"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = asdict(capability_of(properties.major, properties.minor))
        del capability["minimum"]
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
            }
            | capability
        )
    return devices, ""


def _rows(packages: dict[str, str | None], vllm: dict[str, Any], devices: Rows, no_devices: str) -> Rows:
    def row(what: str, found: str, meaning: str = "") -> dict[str, str]:
        return {"what": what, "found": found, "meaning": meaning}

    rows = [row(name, version or "not installed") for name, version in packages.items()]
    rows.append(row("vllm", vllm["version"] or "not installed"))
    plugin = vllm["plugin"]
    if not plugin["installed"]:
        rows.append(row("vllm plugin", "not installed"))
    else:
        rows.append(row("vllm plugin", "installed", "" if plugin["active"] else "VLLM_PLUGINS leaves it out"))
    for fault in vllm["faults"] if vllm["version"] else []:
        meaning = fault["reason"]
        if fault["state"] == State.PRESENT:
            outcome = "the plugin mends it" if fault["mended_by_plugin"] else "nothing mends it"
            meaning = f"{fault['sentence']}; {outcome}"
        rows.append(row(f"fault {fault['name']}", fault["state"], meaning))
    for family in vllm["families"]:
        loads = f"loads it ({family['module']})" if family["module"] else "can't load it"
        rows.append(row(f"family {family['family']}", loads, "; ".join(family["faults"])))
    for device in devices:
        rows.append(
            row(
                f"cuda:{device['index']}",
                f"{device['name']}, {device['capability']}, {bytes_text(device['memory'])}",
                f"runs the checkpoint: {device['runs']}; attention {device['attention']}, experts {device['experts']},"
                f" KV cache {device['kv_cache']}",
            )
        )
    if not devices:
        rows.append(row("cuda", "none", no_devices))
    return rows
