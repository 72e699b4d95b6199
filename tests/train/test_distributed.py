"""Several processes are one job: the same losses, one set of files, one stop, one resume."""

import io
import json
import signal
import time
import urllib.error
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from runs import finish_job, flags_of, free_port, start, start_job

from configs import smoke
from llm_jax import api
from llm_jax import config as configs
from llm_jax.sharding import MESH_AXES
from llm_jax.train import cluster, distributed, loop

SHORT = {
    "steps": 12,
    "batch_size": 8,
    "length": 32,
    "model.d_model": 32,
    "model.n_layers": 1,
    "model.n_heads": 4,
    "model.d_ff": 64,
    "model.vocab_multiple": 8,
    "model.scan": False,
    "eval.every": 0,
    "checkpoint.every": 6,
    "log.compilation_cache": "",
}


def args(workdir, corpus, **changes) -> list[str]:
    return [
        "--config=configs/smoke.py",
        f"--workdir={workdir}",
        f"--input={corpus}",
        *flags_of({**SHORT, **changes}),
    ]


def lines(workdir) -> list[dict]:
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(workdir) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r.get("eval_loss")) for r in lines(workdir)]


def assert_close(got: list[tuple], want: list[tuple], rtol: float) -> None:
    got, want = np.array(got, float), np.array(want, float)
    np.testing.assert_allclose(got[:, [0, 1, 3]], want[:, [0, 1, 3]], rtol=rtol)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The losses of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    cfg = configs.override(smoke.get_config(), {**SHORT, "data.inputs": (str(corpus),)})
    loop.train(cfg, workdir, devices=jax.devices()[:1])
    return losses(workdir)


def wait_for_line(job, workdir, count: int) -> None:
    deadline = time.monotonic() + 400
    while len(lines(workdir)) < count:
        if any(p.poll() is not None for p in job) or time.monotonic() > deadline:
            for process in job:
                process.kill()
            raise AssertionError(finish_job(job))
        time.sleep(0.02)


# ------------------------------------------------------------------------------ what a process is

SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[3-6]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1"}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3", "JAX_NUM_PROCESSES": "4",
}  # fmt: skip
NAMED = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "flags", "want"),
    [
        ({}, {}, None),
        ({}, {"mode": "off", "num_processes": 4}, None),
        ({}, {"num_processes": 1, "process_id": 0}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, {}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}, {}, None),  # no srun
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
        ({**SLURM}, {"mode": "off"}, None),
        (SLURM, {}, ("Slurm", None, 4, 2, True)),
        (SLURM, {"coordinator_address": "a:1"}, ("Slurm", "a:1", 4, 2, True)),
        (OPEN_MPI, {}, ("Open MPI", None, 4, 1, True)),
        ({**SLURM, **OPEN_MPI}, {}, ("Open MPI", None, 4, 1, True)),  # mpirun inside of Slurm
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, ("a TPU pod on GKE", None, None, None, True)),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            {},
            ("a TPU pod on GKE", None, None, None, True),
        ),
        (NAMED, {}, ("environment variables", "node1:1234", 4, 3, False)),
        (NAMED, {"process_id": 0}, ("flags", "node1:1234", 4, 0, False)),
        ({**SLURM, **NAMED}, {}, ("environment variables", "node1:1234", 4, 3, False)),
        (
            {},
            {"coordinator_address": "[::1]:99", "num_processes": 2, "process_id": 1},
            ("flags", "[::1]:99", 2, 1, False),
        ),
        (
            {**POD, "JAX_COORDINATOR_ADDRESS": "first:8476"},
            {},
            ("Kubernetes", "first:8476", 4, 3, False),
        ),
    ],
)
def test_what_a_process_is_a_part_of(env, flags, want):
    found = cluster.find(**flags, env=env)
    assert (tuple(found) if found else None) == want


def test_the_first_pod_of_a_job_is_known_by_name(monkeypatch):
    monkeypatch.setattr(cluster.socket, "getfqdn", lambda name: f"{name}.pods.default.svc")
    found = cluster.find(env={**POD, "HOSTNAME": "run-3"})
    assert found == ("Kubernetes", "run-0.pods.default.svc:8476", 4, 3, False)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS"):
        cluster.find(env={**POD, "HOSTNAME": "somebody-else"})


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ({"worker-network-endpoints": "a,b,c,d"}, "a Cloud TPU pod"),
        ({"worker-network-endpoints": "x:1:10.0.0.2", "tpu-env": ""}, None),
        (
            {"worker-network-endpoints": "a", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"},
            "a Cloud TPU pod",
        ),
        ({}, None),  # a notebook's TPU
    ],
)
def test_a_tpu_asks_its_machine_whether_it_is_a_pod(monkeypatch, attributes, want):
    def urlopen(request, timeout):
        name = request.full_url.rsplit("/", 1)[1]
        if name not in attributes:
            raise urllib.error.URLError("404")
        return io.BytesIO(attributes[name].encode())

    monkeypatch.setattr(cluster, "accelerators", lambda: [("tpu", "TPU accel0")])
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cluster.urllib.request, "urlopen", urlopen)
    found = cluster.find(env={})
    assert (found.how if found else None) == want
    assert cluster.find(env={"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize(
    ("env", "flags", "message"),
    [
        ({}, {"mode": "on"}, "--distributed=on, but this process is on its own.*--coordinator"),
        (
            {},
            {"coordinator_address": "a:1"},
            r"--coordinator_address=a:1 is given, but not --num_processes \(or JAX_NUM_PROCESSES\) "
            r"and --process_id",
        ),
        ({"JAX_NUM_PROCESSES": "4"}, {"process_id": 1}, "but not --coordinator_address"),
        ({"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID=one has to be a number"),
        (NAMED, {"process_id": 4}, "--process_id=4 has to be between 0 and 3: --num_processes=4"),
        (NAMED, {"coordinator_address": "node1"}, "=node1 has to be HOST:PORT"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            {},
            "Open MPI tells no address",
        ),
        (
            {k: v for k, v in POD.items() if k != "JAX_NUM_PROCESSES"},
            {},
            "JOB_COMPLETION_INDEX=3 .*JAX_NUM_PROCESSES",
        ),
    ],
)
def test_half_of_what_is_needed_is_an_error_of_one_line(env, flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        cluster.find(**flags, env=env)
    assert "\n" not in str(caught.value)


def test_who_does_not_come_is_an_error_of_one_line(corpus, tmp_path):
    """jax would abort with pages of C++ stacks. Both take the three seconds at the same time."""
    plain = args(tmp_path, corpus) + ["--coordinator_timeout=3", "--num_processes=2"]
    nobody = free_port()
    job = [
        start("pretrain", *plain, f"--coordinator_address=127.0.0.1:{nobody}", "--process_id=1"),
        start("pretrain", *plain, f"--coordinator_address=127.0.0.1:{free_port()}", "--process_id=0"),
    ]  # fmt: skip
    (code, _, lonely), (other, _, waits) = finish_job(job)
    assert code == other == 1
    assert (
        lonely.startswith("error: process 1 cannot reach the coordinator") and str(nobody) in lonely
    )
    assert waits.startswith("error: not all 2 processes came within 3 s")
    assert lonely.count("\n") == waits.count("\n") == 1, (lonely, waits)


# ---------------------------------------------------------------------------------- rows of data


def mesh_of(order: list[int], **sizes: int) -> Mesh:
    devices = np.array(jax.devices())[order].reshape([sizes.get(a, 1) for a in MESH_AXES])
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@pytest.mark.parametrize(
    ("order", "sizes", "want"),
    [
        ("01234567", {"data": 8}, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("01234567", {"data": 2, "fsdp": 2, "expert": 2}, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("01234567", {"data": 2, "tensor": 4}, [(0,), (0,), (1,), (1,)]),
        ("01234567", {"data": 2, "context": 4}, [(0,), (0,), (1,), (1,)]),
        ("01234567", {"stage": 4, "data": 2}, [(0,), (0,), (1,), (1,)]),  # data comes first
        ("01234567", {"tensor": 8}, [(0,)] * 4),
        ("01234567", {"fsdp": 4, "tensor": 2}, [(0,), (1,), (2,), (3,)]),
        # A mesh that follows the network: no process has neighbours.
        ("02461357", {"data": 8}, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("02461357", {"data": 4, "tensor": 2}, [(0, 2), (0, 2), (1, 3), (1, 3)]),
    ],
)
def test_a_process_needs_the_rows_of_its_devices(order, sizes, want):
    """Of four processes with two devices each. "The h-th of 4 blocks" is wrong in all but two."""
    mesh = mesh_of([int(i) for i in order], **sizes)
    found = [distributed.row_blocks(mesh, lambda d, h=h: d.id // 2 == h) for h in range(4)]
    count = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1)
    assert found == [(blocks, count) for blocks in want]


# What two processes with two devices each find out; the last line is JSON.
PAIR = """
import json, time, signal, sys
from llm_jax.train import distributed

def report(error):
    print(error, file=sys.stderr)

with distributed.job(report, mode="on"):
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, Mesh
    from llm_jax.sharding import MESH_AXES
    from llm_jax.train.program import put
    from llm_jax.types import Batch

    me, out = jax.process_index(), {}
    whole = np.arange(8 * 6).reshape(8, 6)
    for order, sizes, k in (
        ([0, 1, 2, 3], {"data": 4}, None),
        ([0, 1, 2, 3], {"data": 4}, 2),
        ([0, 2, 1, 3], {"data": 4}, 2),  # each process: two blocks that are no neighbours
        ([0, 1, 2, 3], {"context": 2, "tensor": 2}, 2),  # each process: half of the length
        ([0, 2, 1, 3], {"fsdp": 2, "context": 2}, 4),  # both: all rows, a part of the length
    ):
        devices = np.array(jax.devices())[order].reshape([sizes.get(a, 1) for a in MESH_AXES])
        mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 6)
        blocks, count = distributed.row_blocks(mesh)
        mine = whole.reshape(count, -1, 6)[list(blocks)].reshape(-1, 6)
        batch = put(Batch(tokens=mine, weights=mine[:, :1]), mesh, k)
        want = whole if k is None else np.stack([whole[j::k] for j in range(k)])
        for leaf, values in ((batch.tokens, want), (batch.weights, want[..., :1])):
            for shard in leaf.addressable_shards:
                assert (np.asarray(shard.data) == values[shard.index]).all(), (order, sizes, k)
        if "context" in sizes:
            assert batch.tokens.addressable_shards[0].data.shape[-1] == 3

    out["from_main"] = distributed.from_main("word", lambda: f"made by {me}")
    try:
        distributed.check_equal({"config": {"seed": 0}, "data": {"rows": me}})
    except ValueError as e:
        out["differs"] = str(e)

    stop = distributed.StopSignals()
    for step in range(100, 200):
        multihost_utils.process_allgather(np.float32(step))  # a training step
        if step == 105 and me == 1:
            signal.raise_signal(signal.SIGTERM)
        if stop.reached():
            break
        time.sleep(0.05 * (1 + me))
    out["stop"] = [step, stop.asked]
    print(json.dumps(out))
"""


def test_two_processes_share_rows_words_and_a_stop():
    ends = finish_job(start_job(2, "-c", PAIR, devices=2))
    assert [code for code, _, _ in ends] == [0, 0], ends
    zero, one = (json.loads(out.splitlines()[-1]) for _, out, _ in ends)
    assert zero["from_main"] == one["from_main"] == "made by 0"
    assert "differs" not in zero
    assert "process 1 has another data than process 0" in one["differs"]
    assert zero["stop"] == one["stop"]  # the signal came to one of them
    step, asked = zero["stop"]
    assert 105 < step < 199 and asked == "SIGTERM"


# ------------------------------------------------------------------------------------ whole runs


def test_four_processes_train_as_one_and_write_one_set_of_files(corpus, tmp_path, alone):
    job = start_job(4, "pretrain", *args(tmp_path, corpus, accumulation=2))
    ends = finish_job(job)
    assert [code for code, _, _ in ends] == [0] * 4, ends
    assert_close(losses(tmp_path), alone, rtol=2e-6)
    assert "4 processes, found through environment variables" in ends[0][1]
    for _, out, err in ends[1:]:  # process 0 alone speaks
        assert [line for line in out.splitlines() if not line.startswith("[Gloo]")] == [], out
        assert err == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["checkpoints", "config.json", "data", "env.json", "metrics.jsonl", "plots", "report.md",
         "summary.json"]
    )  # fmt: skip
    assert json.loads((tmp_path / "env.json").read_text())["processes"] == 4
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12", "6"]
    assert api.load(tmp_path).config.steps == 12  # one process reads what four have written


@pytest.mark.parametrize(
    ("processes", "victim", "mesh"),
    [
        (2, 1, {"mesh.tensor": 2}),  # each holds one half of every matrix
        pytest.param(4, 0, {"mesh.fsdp": 2, "mesh.tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_job_and_it_resumes_bit_for_bit(
    corpus, tmp_path, processes, victim, mesh
):
    # Not in the background: where step 9 is logged, the checkpoint of step 6 is whole.
    changes = {"steps": 40, "optimizer.schedule": "constant", "checkpoint.asynchronous": False}
    changes |= mesh
    broken = start_job(processes, "pretrain", *args(tmp_path / "broken", corpus, **changes))
    wait_for_line(broken, tmp_path / "broken", 9)
    broken[victim].kill()
    begin = time.monotonic()
    ends = finish_job(broken)
    assert time.monotonic() - begin < 60
    assert ends.pop(victim)[0] == -signal.SIGKILL
    for code, _, err in ends:
        assert code == 70, err
        assert f"process {victim} " in err and f"of {processes} died" in err, err
        assert "run the same command again" in err, err
        assert "most recent call first" in err and "llm_jax/train/loop.py" in err, err
    assert 9 <= len(lines(tmp_path / "broken")) < 40

    for name in ("broken", "unbroken"):
        job = start_job(processes, "pretrain", *args(tmp_path / name, corpus, **changes))
        ends = finish_job(job)
        assert [code for code, _, _ in ends] == [0] * processes, ends
        assert ("resuming from step" in ends[0][1]) == (name == "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    one, other = (api.load(tmp_path / name).params for name in ("broken", "unbroken"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_sigterm_to_one_process_stops_all_at_one_step(corpus, tmp_path, alone):
    """Each process holds one half of every row (context parallelism)."""
    changes = {"mesh.context": 2, "steps": 1000}
    job = start_job(2, "pretrain", *args(tmp_path, corpus, **changes))
    wait_for_line(job, tmp_path, 15)
    job[1].send_signal(signal.SIGTERM)
    ends = finish_job(job)
    assert [code for code, _, _ in ends] == [143, 143], ends
    stopped = losses(tmp_path)[-1][0]
    assert f"stopped by SIGTERM and saved at step {stopped}" in ends[0][1]
    assert str(stopped) in {p.name for p in (tmp_path / "checkpoints").iterdir()}


def test_a_stuck_process_is_named(corpus, tmp_path):
    """A real hang: process 1 is stopped, so that process 0 waits in a collective forever."""
    changes = {"steps": 100_000, "log.watchdog_minutes": 0.15, "checkpoint.every": 0}
    job = start_job(2, "pretrain", *args(tmp_path, corpus, **changes))
    wait_for_line(job, tmp_path, 15)
    job[1].send_signal(signal.SIGSTOP)
    try:
        code, _, err = finish_job(job[:1])[0]
    finally:
        job[1].kill()
        job[1].communicate()
    assert code == 70, err
    assert "watchdog: no progress for" in err and "1: no answer" in err, err
    assert "most recent call first" in err and "in _record" in err, err
