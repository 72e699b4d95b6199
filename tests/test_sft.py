"""Tuning on conversations from the command line: a file with damage in it, and the model asked after."""

import json

import pytest
from runs import finish_job, flags_of, run_binary, run_config, start_job

from llm_jax.train.loop import train

SHORT = {
    "steps": 4,  # in place of the recipe's epochs
    "batch_size": 4,
    "length": 320,
    "optimizer.warmup_steps": 0,
    "eval.sample_tokens": 4,
    "log.compilation_cache": "",
}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base")
    train(run_config(corpus, **{"steps": 2, "optimizer.warmup_steps": 0}), workdir)
    return workdir


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Twenty conversations, and three rows that are none."""
    good = [json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) for i in range(20)]
    rows = [x.encode() for x in good]
    rows[3:3] = [b'{"prompt": "\xff", "completion": "x"}', b'{"prompt": "a", "completion": ""}']
    rows.append(
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}'
    )
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def sft(base, damaged, workdir, **changes):
    return run_binary(
        "sft",
        "--config=configs/sft_embedded.py",
        f"--init_from={base}",
        f"--input={damaged}",
        f"--workdir={workdir}",
        *flags_of({**SHORT, **changes}),
    )


def test_a_run_counts_what_it_left_out_and_answers(base, damaged, tmp_path):
    done = sft(base, damaged, tmp_path / "run", **{"peft.method": "lora"})
    assert done.returncode == 0, done.stderr
    for line, rule in ((4, "invalid UTF-8"), (5, "empty answer"), (23, "two turns in a row")):
        assert f"{damaged}:{line}: {rule}" in done.stderr
    rejected = [json.loads(x) for x in (tmp_path / "run/data/rejected.jsonl").open()]
    assert [row["line"] for row in rejected] == [4, 5, 23]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_at_start"]
    report = (tmp_path / "run/report.md").read_text()
    assert "| train | 18 |" in report
    for step in (0, 4):
        for prompt in ("What is os.path.join?", "What does json.loads do?"):
            assert f"**Step {step}, prompt '{prompt}'**\n\n```\n" in report
    assert "```\nWhat is os.path.join?" not in report  # an answer is a turn of its own
    asked = run_binary(
        "generate",
        f"--checkpoint={tmp_path / 'run'}",
        "--chat",
        "--prompt=What is 7?",
        "--max_new_tokens=4",
    )
    assert asked.returncode == 0, asked.stderr


@pytest.mark.slow  # half a minute
def test_two_processes_tune_as_one(base, damaged, tmp_path):
    def losses(workdir):
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        return [row["loss"] for row in rows if row["step"]]  # 0 is only evaluated

    lora = {"peft.method": "lora", "peft.base": "nf4", "log.every": 1}
    alone = sft(base, damaged, tmp_path / "one", **lora)
    assert alone.returncode == 0, alone.stderr
    job = start_job(
        2,
        "sft",
        "--config=configs/sft_embedded.py",
        f"--init_from={base}",
        f"--input={damaged}",
        f"--workdir={tmp_path / 'two'}",
        *flags_of({**SHORT, **lora, "mesh.data": 1, "mesh.fsdp": 2}),
    )
    for code, _, err in finish_job(job):
        assert code == 0, err
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 4 and two == pytest.approx(one, rel=2e-5)


def test_damage_is_fatal_by_flag(base, damaged, tmp_path):
    done = sft(base, damaged, tmp_path / "run", **{"data.dialogue.malformed": "fail"})
    assert done.returncode == 1 and not (tmp_path / "run/checkpoints").exists()
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: 3 malformed rows") and f"{damaged}:4" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--init_from is needed"),
        (["--config.data.format=text", "--init_from=X"], "data.format=text"),
    ],
)
def test_what_is_missing_is_named(base, tmp_path, flags, message):
    flags = [f.replace("X", str(base)) for f in flags]
    done = run_binary(
        "sft", "--config=configs/sft_embedded.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert done.returncode == 1 and message in done.stderr
