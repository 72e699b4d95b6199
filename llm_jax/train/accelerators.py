"""Accelerators that a machine has, found without jax: so that none stays unused unnoticed."""

import glob
import importlib.metadata as metadata
import os
import re
import subprocess

# PCI devices of vendor 0x1ae0 that are TPUs (v2-v3, v4, v5p, v5e, v6e, v7x); others of that vendor
# are network cards.
TPU_PCI_IDS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def accelerators(root: str = "/") -> list[tuple[str, str]]:
    """Accelerators of the machine, whether or not jax can use them: (extra that uses it, name)."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        names = listed.stdout.splitlines() if listed.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        names = []

    def under(pattern: str) -> list[str]:
        return sorted(glob.glob(os.path.join(root, pattern)))

    if not names:
        nodes = [n for n in under("dev/nvidia*") if re.fullmatch(r"nvidia\d+", os.path.basename(n))]
        names = [f"NVIDIA GPU {node}" for node in nodes or under("dev/dxg")]  # dxg: Windows' WSL
    found = [("cuda", name.strip()) for name in names if name.strip()]
    chips = [n for n in under("dev/accel*") if re.fullmatch(r"accel\d+", os.path.basename(n))]
    for device in [] if chips else under("sys/bus/pci/devices/*"):
        ids = []
        for name in ("vendor", "device"):
            try:
                with open(os.path.join(device, name)) as f:
                    ids.append(f.read().strip())
            except OSError:
                ids.append("")
        if ids[0] == "0x1ae0" and ids[1] in TPU_PCI_IDS:
            chips.append(os.path.basename(device))
    return found + [("tpu", f"TPU {chip}") for chip in chips]


def unused_accelerators(present: list[tuple[str, str]], backend: str) -> list[str]:
    """One problem for each kind of accelerator that is present while jax computes on the CPU."""
    problems = []
    for extra in dict.fromkeys(extra for extra, _ in present) if backend == "cpu" else ():
        names = [name for e, name in present if e == extra]
        what = f"{len(names)} accelerator(s) present ({names[0]}), but jax runs on the CPU: "
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if platforms and not {extra, "gpu"} & set(platforms.split(",")):
            cure = f"JAX_PLATFORMS={platforms} hides them, unset it"
        elif (
            any(d.name.startswith("jax-cuda") for d in metadata.distributions()) and extra == "cuda"
        ):
            show = 'JAX_PLATFORMS=cuda python -c "import jax; jax.devices()"'
            cure = f"the CUDA plugin is installed and does not start; see why with {show}"
        else:
            cure = f"pip install 'llm_jax[{extra}]'"
        problems.append(what + cure)
    return problems
