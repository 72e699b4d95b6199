"""Several processes as one job: how they find each other, which rows are whose, when all stop.

Every function here does the obvious thing when there is one process only.
"""

import contextlib
import faulthandler
import functools
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.train import cluster, watchdog

DAY = 86_400
_peers: watchdog.Peers | None = None


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    mode: str = "auto",
    timeout: float = 300,
    peer_timeout: float = 30,
) -> cluster.Cluster | None:
    """Joins the job that `cluster.find` finds, before anything else has touched a device.

    From here on, the end of one process is the end of all (`watchdog.Peers`).

    Args:
      timeout: seconds to wait for the other processes.
      peer_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
      ValueError: as `cluster.find`. If the others do not come in time, the process prints one line
        and ends with exit code 1 (jax would abort with pages of C++ stacks).
    """
    global _peers
    if not faulthandler.is_enabled():
        faulthandler.enable()  # what crashes in native code leaves Python's stacks
    found = cluster.find(coordinator_address, num_processes, process_id, mode)
    if found is None:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and mode == "auto":
            print(f"note: SLURM_NTASKS={os.environ['SLURM_NTASKS']}, but srun did not start this")
        return None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    came = threading.Timer(timeout, _give_up, [found, timeout])
    came.daemon = True
    came.start()
    try:
        jax.distributed.initialize(
            found.address,
            found.processes,
            found.process,
            cluster_detection_method=None if found.detect else "deactivate",
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=int(peer_timeout),
        )
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"cannot start as a part of {found.how}: {e}") from e
    finally:
        came.cancel()
    state = _state()
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    _peers = watchdog.Peers(state.process_id, state.num_processes, host, state.client)
    if state.process_id == 0:
        print(
            f"{state.num_processes} processes, found through {found.how}; "
            f"the coordinator is {state.coordinator_address}",
            flush=True,
        )
    return found


def _give_up(found: cluster.Cluster, timeout: float) -> None:
    """In a thread of its own: jax waits in native code, and aborts the process in the end."""
    state = _state()
    address = state.coordinator_address or found.address or ""
    host, _, port = address.rpartition(":")
    reached = state.process_id == 0
    if not reached:
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            reached = True
    if reached:
        what = f"not all {state.num_processes or found.processes} processes came"
        cure = "is one missing, or are there two with one --process_id?"
    else:
        what = f"process {state.process_id} cannot reach the coordinator (process 0) at {address}"
        cure = f"does process 0 run, is the address right, may it be reached on port {port}?"
    print(f"error: {what} within {timeout:g} s (--coordinator_timeout); {cure}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _state() -> Any:
    # jax has no public name for its key-value store and barriers; Orbax uses them by this one.
    from jax._src import distributed

    return distributed.global_state


# --------------------------------------------------------------------------------- leaving the job


@contextlib.contextmanager
def job(
    report: Callable[[BaseException], None], **options: Any
) -> Iterator[cluster.Cluster | None]:
    """`start(**options)`, and on the way out what the other processes need to know."""
    try:
        yield start(**options)
    except SystemExit:  # an agreed stop
        finish()
        raise
    except BaseException as error:
        fail(error, report)
        raise
    finish()


def finish() -> None:
    """This process ends as it should; what the others do does not matter from here on."""
    if _peers is not None:
        _peers.finish()


def fail(error: BaseException, report: Callable[[BaseException], None]) -> None:
    """Reports an error and ends the process, where it is one of several: with exit code 1 where a
    user can mend it, else with the watchdog's, so that the job is tried again.

    Without this it would wait for the others at its exit, and they for it in the next collective.
    """
    if _peers is None:
        return
    report(error)
    code = 1
    if not isinstance(error, (ValueError, OSError, ImportError)):
        # Most likely a collective that failed because another process is gone: who it was is
        # about to arrive, and ends this process with that message.
        time.sleep(3)
        code = watchdog.STUCK_EXIT
    sys.stdout.flush()
    sys.stderr.flush()
    _peers.fail(str(error) or type(error).__name__, code)
    os._exit(code)


class StopSignals:
    """SIGTERM and the first Ctrl-C ask for a stop after the step that runs.

    With several processes it is enough that one of them gets the signal (a preemption notice): jax's
    coordination service passes it on and finds the next step that none has begun, and there all of
    them stop. jax listens to SIGTERM itself then; Ctrl-C is handed to it as one.
    """

    def __init__(self):
        self.asked = ""
        self._several, self._step = jax.process_count() > 1, 0
        self._old: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._ask)
        except ValueError:
            pass  # not in the main thread (a notebook's worker): signals stay as they are

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to stop after this step; to be called once in every step, by every process."""
        if not self._several:
            return bool(self.asked)
        # Counted from the start of the process: a notice that came before the first step is
        # answered in it.
        self._step += 1
        if not multihost_utils.reached_preemption_sync_point(self._step):
            return False
        self.asked = self.asked or "SIGTERM"
        return True

    def restore(self) -> None:
        """Puts the signal handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------- what is shared

_names = itertools.count()  # a name of the key-value store is used once; all processes count alike


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def from_main(name: str, make: Callable[[], str]) -> str:
    """What process 0 makes, at all processes; they wait for it up to a day, on no device."""
    client, key = _state().client, f"llm_jax/{next(_names)}/{name}"
    if client is None:
        return make()
    if is_main():
        value = make()
        client.key_value_set(key, value)
        return value
    return client.blocking_key_value_get(key, DAY * 1000)


def barrier(name: str) -> None:
    """Waits for all processes, up to a day, on no device."""
    client, key = _state().client, f"llm_jax/{next(_names)}/{name}"
    if client is not None:
        client.wait_at_barrier(key, DAY * 1000)


def check_equal(values: Mapping[str, Any]) -> None:
    """Raises ValueError at a process whose JSON-ready `values` are not those of process 0.

    Different flags or data on one machine are otherwise a hang in some later step.
    """
    mine = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    theirs = json.loads(from_main("equal", lambda: json.dumps(mine)))
    for name, value in mine.items():
        if value != theirs.get(name):
            raise ValueError(
                f"process {jax.process_index()} has another {name} than process 0: "
                f"{_difference(value, str(theirs.get(name)))}; give all processes the same command"
            )


def _difference(a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    at = max(at - 30, 0)
    return f"...{a[at : at + 60]}... against ...{b[at : at + 60]}..."


def check_shared(folder: Path) -> None:
    """Raises ValueError at a process that does not see what process 0 writes to `folder`."""
    if jax.process_count() == 1:
        return
    probe = folder / ".shared-by-all-processes"
    name = from_main("shared", lambda: probe.write_text("") or str(probe.absolute()))
    deadline = time.monotonic() + 60  # network file systems may take a while
    while not probe.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"--workdir={folder}: process {jax.process_index()} on {socket.gethostname()} does "
                f"not see {name}, which process 0 wrote; take a folder that all machines share"
            )
        time.sleep(0.5)
    barrier("shared")
    if is_main():
        probe.unlink()


def positions(where: str) -> str:
    """Where every process is, "0: step 12, 1: no answer"; for a watchdog's last line."""
    client = _state().client
    if client is None:
        return ""
    folder = "llm_jax/stuck/"
    with contextlib.suppress(Exception):  # the service may be what hangs
        client.key_value_set(f"{folder}{jax.process_index()}", where, allow_overwrite=True)
        time.sleep(5)  # the others' watchdogs are about to bark as well
        found = dict(client.key_value_dir_get(folder))
        each = [
            f"{i}: {found.get(f'{folder}{i}', 'no answer')}" for i in range(jax.process_count())
        ]
        return "processes " + ", ".join(each)
    return "the coordinator does not answer"


# ------------------------------------------------------------------------------------- rows of data


@functools.lru_cache
def row_blocks(
    mesh: Mesh, mine: Callable[[jax.Device], bool] | None = None
) -> tuple[tuple[int, ...], int]:
    """(which blocks of a batch's rows this process needs, how many blocks there are).

    The batch axis cuts the rows of a batch into equal blocks. A process needs those that its
    devices hold: several processes need the same ones where tensor, context or stage span
    machines, and they need not be neighbours in a mesh that follows the machines' network.

    Args:
      mine: which devices count; default: those of this process.
    """
    mine = mine or (lambda device: device.process_index == jax.process_index())
    count = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    held = sharding.named(("batch",), mesh).devices_indices_map((count,))
    return tuple(sorted({rows.start or 0 for d, (rows,) in held.items() if mine(d)})), count


def local_rows(rows: slice, total: int, mesh: Mesh) -> slice:
    """Where a device's `rows` of `total` are among the rows that this process has loaded."""
    blocks, count = row_blocks(mesh)
    size = total // count
    start, stop, _ = rows.indices(total)
    at = blocks.index(start // size) * size
    return slice(at + start % size, at + start % size + stop - start)
