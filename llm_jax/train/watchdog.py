"""A job that hangs or has lost a process ends, and says where every thread stood.

A scheduler starts a job again when it ends, never while it hangs. Two things end one here, with the
stacks of all threads on stderr and exit code 70: no progress for too long (`Watchdog`), and another
process that is gone (`Peers`). A machine that vanishes without closing its connections is noticed
by jax's heartbeats, which end the process by SIGABRT; faulthandler prints the stacks then.
"""

import contextlib
import faulthandler
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

STUCK_EXIT = 70
COMPILE_MINUTES = 30.0  # on top, for the first of each kind of work
GRACE_SECONDS = 2.0  # an error that all processes have is reported by each of them
RESUME = "run the same command again to go on from the last checkpoint"
_KEY = "llm_jax/peers"


def end(line: str, delay: float = 0.0) -> None:
    """Prints the line and the stacks of all threads, and ends the process with exit code 70.

    In an interactive session (a notebook) it only prints: the session is not ours to end.
    """
    stderr = sys.__stderr__
    print(f"\n{line}", file=stderr, flush=True)
    faulthandler.dump_traceback(file=stderr, all_threads=True)
    if not hasattr(sys, "ps1"):
        time.sleep(delay)
        os._exit(STUCK_EXIT)


class Watchdog:
    """A thread that calls `end` when `mark` was not called for `minutes` (0: never), until the
    context that it is ends.

    `kill -USR1 PID` prints the stacks at any time and changes nothing.
    """

    def __init__(self, minutes: float, positions: Callable[[str], str] | None = None):
        """`positions(where)`: where the other processes are, for the last line."""
        self._limit, self._positions = 60.0 * minutes, positions
        self._seen: Counter[str] = Counter()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self.mark("start")
        if minutes:
            if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
                faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self, kind: str, detail: Any = "") -> None:
        """Something is finished and the work `kind` begins, such as mark("step", 118)."""
        with self._lock:
            self._where, self._waited = f"{kind} {detail}", 0.0
            self._seen[kind] += 1
            # Compiling: here the first time, and the second time where another process is slower.
            early = self._seen[kind] <= 2
            self._allowed = self._limit + (60.0 * COMPILE_MINUTES if early else 0.0)

    def _watch(self) -> None:
        tick = min(self._limit / 20, 5.0)
        before = time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            with self._lock:
                # A process that was itself stopped (Ctrl-Z) did not wait all that time.
                self._waited += min(now - before, 2 * tick)
                where, late = self._where.strip(), self._waited > self._allowed
            before = now
            if late:
                line = f"watchdog: no progress for {self._waited / 60:.3g} minutes in {where}"
                if self._positions:
                    line += f" ({self._positions(where)})"
                end(f"{line}; see log.watchdog_minutes; {RESUME}")
                self.mark("hung session")

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()


class Peers:
    """Ends this process at once when another process of the job ends before its time.

    Each process keeps a TCP connection to process 0 open, and the kernel closes it however a
    process dies; process 0 tells the others. A process that leaves because of an error says which.
    """

    def __init__(self, process: int, count: int, host: str, store: Any):
        """`store` is jax's key-value store, `host` the machine of process 0."""
        self._process, self._count = process, count
        self._leaving = threading.Event()
        self._links: list[socket.socket] = []
        if process == 0:
            listener, token = _listener(), secrets.token_hex(8)
            store.key_value_set(_KEY, f"{listener.getsockname()[1]} {token}")
            work = lambda: self._serve(listener, token)  # noqa: E731
        else:
            port, token = store.blocking_key_value_get(_KEY, 60_000).split()
            try:
                link = socket.create_connection((host, int(port)), timeout=20)
            except OSError as e:
                print(
                    f"note: process {process} cannot reach port {port} of process 0 ({e}); a dead "
                    "process is noticed by jax's heartbeats only",
                    file=sys.stderr,
                )
                return
            link.settimeout(None)
            _keep_alive(link)
            self._links.append(link)
            self._tell(f"hello {token} {process} {socket.gethostname()}")
            work = lambda: self._listen(link)  # noqa: E731
        threading.Thread(target=work, name="peers", daemon=True).start()

    def finish(self) -> None:
        """This process ends well; from here on it does not matter what the others do."""
        self._leaving.set()
        self._tell("bye")

    def fail(self, text: str, code: int) -> None:
        """This process is about to end with `code` because of an error that `text` names."""
        self._leaving.set()
        text = f"{code} " + " ".join(text.split())
        if self._process == 0:
            time.sleep(GRACE_SECONDS)
            self._tell(f"dead {_failed('process 0', self._count, text)}")
            time.sleep(0.5)
        else:
            self._tell(f"failed {text}")

    def _tell(self, text: str) -> None:
        for link in list(self._links):
            with contextlib.suppress(OSError):
                link.sendall(text.encode() + b"\n")

    def _end(self, reason: str) -> None:
        """`reason` begins with an exit code: 1 is an error that somebody has to mend."""
        if self._leaving.is_set():
            return
        if self._process == 0:
            self._tell(f"dead {reason}")
        # Process 0 is also jax's coordinator, whose end the others do not survive for long: they
        # are to read the reason first.
        delay = 0.5 * (self._process == 0)
        code, _, reason = reason.partition(" ")
        line = f"{reason}; process {self._process} ends too"
        if int(code) == STUCK_EXIT:
            end(f"{line}: {RESUME}", delay)
        print(line, file=sys.__stderr__, flush=True)
        time.sleep(delay)
        os._exit(int(code))

    def _listen(self, link: socket.socket) -> None:
        """The other processes: what process 0 says, or that it is gone."""
        lines = _Lines()
        while True:
            try:
                data = link.recv(4096)
            except OSError:
                data = b""
            for kind, text in lines.feed(data):
                if kind == "bye":
                    return
                if kind == "dead":
                    self._end(text)
            if not data:
                return self._end(_died("process 0", self._count))

    def _serve(self, listener: socket.socket, token: str) -> None:
        """Process 0: who is connected, and who is gone without a good-bye."""
        poll = selectors.DefaultSelector()
        poll.register(listener, selectors.EVENT_READ)
        reason, due = "", 0.0
        while True:
            for key, _ in poll.select(0.2):
                if key.fileobj is listener:
                    link, _ = listener.accept()
                    _keep_alive(link)
                    poll.register(link, selectors.EVENT_READ, _Lines())
                    continue
                link, lines = key.fileobj, key.data
                try:
                    data = link.recv(4096)
                except OSError:
                    data = b""
                for kind, text in lines.feed(data):
                    if kind == "hello" and text.startswith(f"{token} "):
                        lines.name = "process {} ({})".format(*text.split()[1:])
                        self._links.append(link)
                    elif lines.name and kind == "bye":
                        lines.name = ""
                    elif lines.name and kind == "failed" and not reason:
                        reason = _failed(lines.name, self._count, text)
                        due = time.monotonic() + GRACE_SECONDS
                if not data:
                    poll.unregister(link)
                    if link in self._links:
                        self._links.remove(link)
                    link.close()
                    if lines.name and not reason:
                        reason, due = _died(lines.name, self._count), time.monotonic()
            if reason and time.monotonic() >= due:
                return self._end(reason)


class _Lines:
    """Bytes of a connection -> (first word, rest) of each whole line."""

    def __init__(self):
        self.name, self._rest = "", b""

    def feed(self, data: bytes) -> list[tuple[str, str]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace").partition(" ")[::2] for line in lines]


def _died(name: str, count: int) -> str:
    what = f"{name} of {count} died (killed, out of memory, or its machine is gone)"
    return f"{STUCK_EXIT} {what}"


def _failed(name: str, count: int, text: str) -> str:
    code, _, text = text.partition(" ")
    return f"{code} {name} of {count} ended with an error: {text}"


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(link: socket.socket) -> None:
    """A machine that vanishes without a word is noticed within half a minute, where the system
    lets one say so."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
