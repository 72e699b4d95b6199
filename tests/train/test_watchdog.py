"""A job that hangs or loses a process ends with its stacks; real processes, but no jax in them."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest
from runs import ROOT

STACKS = "most recent call first"


def run(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stuck_step_ends_the_process_with_the_stacks_of_all_threads():
    process = run("""
        import threading, time
        from llm_jax.train import watchdog
        watchdog.COMPILE_MINUTES = 0.0

        def waits_for_data():
            time.sleep(100)

        threading.Thread(target=waits_for_data, daemon=True).start()
        dog = watchdog.Watchdog(0.02, lambda where: f"processes 0: {where}, 1: no answer")
        for step in range(1, 15):
            dog.mark("step", step)
            time.sleep(0.1)  # 1.4 s in all: longer than the limit of 1.2 s, but it goes on
        print("15 steps", flush=True)

        def hangs_in_a_collective():
            time.sleep(100)

        hangs_in_a_collective()
    """)
    begin = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 70 and time.monotonic() - begin < 10
    assert out == "15 steps\n"
    assert "watchdog: no progress for" in err and "in step 14 (processes 0: step 14" in err
    assert "log.watchdog_minutes" in err and "run the same command again" in err
    assert "in hangs_in_a_collective" in err and "in waits_for_data" in err and STACKS in err


def test_compiling_and_being_stopped_do_not_count():
    """The first two marks of a kind have the allowance; a stopped process (Ctrl-Z) did not wait."""
    process = run("""
        import time
        from llm_jax.train import watchdog
        dog = watchdog.Watchdog(0.005)  # 0.3 s
        for kind in ("step", "step", "evaluation", "evaluation"):
            dog.mark(kind)
            time.sleep(1.0)
        dog.mark("step")
        print("goes on", flush=True)
        time.sleep(0.1)
        with dog:
            pass
        time.sleep(1.0)
        print("done", flush=True)
    """)
    assert process.stdout.readline() == "goes on\n", process.communicate()
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "done\n", "")


def test_zero_minutes_is_off_and_sigusr1_only_shows_the_stacks():
    process = run("""
        import signal, threading, time
        from llm_jax.train import watchdog
        watchdog.Watchdog(0)
        assert not any(t.name == "watchdog" for t in threading.enumerate())
        watchdog.Watchdog(5)
        signal.raise_signal(signal.SIGUSR1)
    """)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and STACKS in err


PEERS = """
    import os, sys, threading, time
    from llm_jax.train import watchdog

    class Store:  # jax's key-value store, as a file
        def key_value_set(self, key, value):
            with open(path + ".part", "w") as f:
                f.write(value)
            os.replace(path + ".part", path)

        def blocking_key_value_get(self, key, timeout):
            while not os.path.exists(path):
                time.sleep(0.02)
            return open(path).read()

    path, process, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    peers = watchdog.Peers(process, 3, "127.0.0.1", Store())
    open(f"{path}.in.{process}", "w").close()
    while not all(os.path.exists(f"{path}.in.{i}") for i in range(3)):
        time.sleep(0.02)
    if what == "fails":
        time.sleep(0.4 * process)
        peers.fail("no space\\nleft", 1)
        os._exit(1)
    if what == "crashes":
        peers.fail("XlaRuntimeError", 70)
        os._exit(70)
    if what == "finishes":
        peers.finish()
        sys.exit(0)

    def in_a_collective():
        open(f"{path}.{process}", "w").close()
        time.sleep(100)

    in_a_collective()
"""


def peers(tmp_path, *what: str, kill: int | None = None):
    """[(exit code, stderr)] of three processes, and the seconds until the last ended."""
    code = textwrap.dedent(PEERS)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store"), str(i), w],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, w in enumerate(what)
    ]
    begin = time.monotonic()
    try:
        if kill is not None:
            while not all((tmp_path / f"store.{i}").exists() for i in range(3)):
                assert time.monotonic() - begin < 20
                time.sleep(0.02)
            begin = time.monotonic()
            processes[kill].kill()
        ends = [(p.wait(20), p.stderr.read()) for p in processes]
        return ends, time.monotonic() - begin
    finally:
        for p in processes:
            p.kill()
            p.wait()
            p.stderr.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_at_once(tmp_path, victim):
    ends, seconds = peers(tmp_path, "hangs", "hangs", "hangs", kill=victim)
    assert [code for code, _ in ends] == [-9 if i == victim else 70 for i in range(3)]
    assert seconds < 8
    for i, (_, err) in enumerate(ends):
        if i != victim:
            assert f"process {victim} " in err and "of 3 died" in err, err
            assert f"process {i} ends too: run the same command again" in err, err
            assert "in in_a_collective" in err, err


@pytest.mark.parametrize(
    ("process", "what", "code", "text"),
    [
        (0, "fails", 1, "no space left; process {} ends too\n"),
        (2, "fails", 1, "no space left; process {} ends too\n"),
        (1, "crashes", 70, "XlaRuntimeError; process {} ends too: run the same command again"),
    ],
)
def test_an_error_of_one_process_is_told_to_the_others(tmp_path, process, what, code, text):
    """What somebody has to mend ends all with 1, so that no scheduler tries again."""
    ends, seconds = peers(tmp_path, *(what if i == process else "hangs" for i in range(3)))
    assert [c for c, _ in ends] == [code] * 3
    for i, (_, err) in enumerate(ends):
        if i != process:
            assert f"process {process} " in err, err
            assert "of 3 ended with an error: " + text.format(i) in err, err
            assert (STACKS in err) == (code == 70), err
    assert seconds < 12


def test_an_error_that_all_have_is_not_a_death(tmp_path):
    """Each process reports it itself: no stacks, and exit code 1 everywhere."""
    ends, _ = peers(tmp_path, "fails", "fails", "fails")
    assert ends == [(1, "")] * 3


def test_processes_that_finish_one_after_another_are_not_dead(tmp_path):
    ends, _ = peers(tmp_path, "finishes", "finishes", "finishes")
    assert ends == [(0, "")] * 3
