"""Which job a process is a part of: flags, environment variables, and the schedulers that start
many processes. Nothing here starts anything; `llm_jax.train.distributed` does."""

import contextlib
import importlib.util
import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from llm_jax.train.accelerators import accelerators

PORT = "8476"  # of the coordinator, where nobody says another (JAX_COORDINATOR_PORT)
NAMES = {  # flag -> environment variable
    "--coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "--num_processes": "JAX_NUM_PROCESSES",
    "--process_id": "JAX_PROCESS_ID",
}
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class Cluster(NamedTuple):
    """A job of several processes; None is what jax's own cluster detection fills in."""

    how: str
    address: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None
    detect: bool = True  # whether jax's cluster detection has a part in it


def find(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    mode: str = "auto",
    env: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The job that this process is a part of; None: it is on its own.

    Looked at in this order: the arguments, the variables in NAMES, Open MPI, Slurm (`srun`), a TPU
    pod on GKE, an indexed Job or JobSet of Kubernetes, a Cloud TPU pod.

    Args:
      mode: "auto"; "on": finding nothing is an error; "off": this process is on its own.

    Raises:
      ValueError: half of what is needed is given, or a process id out of range.
    """
    if mode == "off":
        return None
    given = {
        "--coordinator_address": coordinator_address or env.get(NAMES["--coordinator_address"]),
        "--num_processes": _number(num_processes, "--num_processes", env),
        "--process_id": _number(process_id, "--process_id", env),
    }
    address, processes, process = given.values()
    missing = [name for name, value in given.items() if value is None]
    by_flags = (coordinator_address, num_processes, process_id) != (None, None, None)
    how = "flags" if by_flags else "environment variables"
    if processes == 1 and not process:
        found = None
    elif not missing:
        found = Cluster(how, address, processes, process, detect=False)
    else:
        found = _around(env, given)
        if found is None and len(missing) < len(given):
            named = " and ".join(f"{n} (or {NAMES[n]})" for n in missing)
            there = " and ".join(f"{n}={given[n]}" for n in given if n not in missing)
            raise ValueError(f"{there} is given, but not {named}")
    if found is None:
        if mode == "on":
            raise ValueError(
                "--distributed=on, but this process is on its own: no Open MPI, Slurm (srun), TPU "
                "pod or Kubernetes Job around it; give --coordinator_address=HOST:PORT "
                "--num_processes=N --process_id=I"
            )
        return None
    if found.processes is not None and not 0 <= (found.process or 0) < found.processes:
        raise ValueError(
            f"--process_id={found.process} has to be between 0 and {found.processes - 1}: "
            f"--num_processes={found.processes}"
        )
    if found.address and not re.fullmatch(r".+:\d+", found.address):
        raise ValueError(f"--coordinator_address={found.address} has to be HOST:PORT")
    return found


def _number(value: int | None, flag: str, env: Mapping[str, str]) -> int | None:
    text = env.get(NAMES[flag]) if value is None else str(value)
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"{NAMES[flag] if value is None else flag}={text} has to be a number")
    return int(text)


def _around(env: Mapping[str, str], given: dict[str, Any]) -> Cluster | None:
    """The scheduler that started this process among others; what is `given` comes first."""
    address, processes, process = given.values()

    def cluster(how: str, n: int | None = None, i: int | None = None) -> Cluster:
        return Cluster(
            how,
            address,
            n if processes is None else processes,
            i if process is None else process,
        )

    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env and not address:
            raise ValueError(
                "this version of Open MPI tells no address: give --coordinator_address=HOST:PORT, "
                "a free port on the machine of rank 0"
            )
        n, i = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
        return cluster("Open MPI", n, i)
    if all(name in env for name in SLURM):
        if int(env["SLURM_NTASKS"]) > 1:
            return cluster("Slurm", int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]))
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    if hosts:
        n = len(hosts.split(",")) * int(env.get("MEGASCALE_NUM_SLICES") or 1)
        return cluster("a TPU pod on GKE") if n > 1 else None
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return _kubernetes(env, given)
    return cluster("a Cloud TPU pod") if _tpu_hosts(env) > 1 else None


def _kubernetes(env: Mapping[str, str], given: dict[str, Any]) -> Cluster:
    """An indexed Job tells each pod its number, and by its host name that of the first pod."""
    address, processes, process = given.values()
    index = env["JOB_COMPLETION_INDEX"]
    if processes is None:
        raise ValueError(
            f"JOB_COMPLETION_INDEX={index} says that this is one pod of an indexed Job: set "
            "JAX_NUM_PROCESSES to the Job's completions, or --distributed=off if each pod is a "
            "run of its own"
        )
    if address is None:
        host, _, domain = socket.getfqdn(env.get("HOSTNAME", "")).partition(".")
        if not domain or not host.endswith(f"-{index}") or process is not None:
            raise ValueError(
                f"the host name {host}.{domain} does not tell that of the first pod: give the Job "
                "a headless service (spec.template.spec.subdomain), or set JAX_COORDINATOR_ADDRESS"
            )
        first = host.removesuffix(index) + "0"
        address = f"{first}.{domain}:{env.get('JAX_COORDINATOR_PORT', PORT)}"
    number = int(index) if process is None else process
    return Cluster("Kubernetes", address, processes, number, detect=False)


def _tpu_hosts(env: Mapping[str, str]) -> int:
    """Machines of the Cloud TPU that this machine is a part of, as its metadata server tells."""
    skip = env.get("TPU_SKIP_MDS_QUERY") or not importlib.util.find_spec("libtpu")
    if skip or "tpu" not in dict(accelerators()):
        return 1

    def attribute(name: str) -> str:
        request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()

    hosts, slices = 1, None
    with contextlib.suppress(OSError):  # a TPU without Google's machine around it: a notebook's
        hosts = len(attribute("worker-network-endpoints").split(","))
        slices = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", attribute("tpu-env"))
    return hosts * (int(slices[1]) if slices else 1)
