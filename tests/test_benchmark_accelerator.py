"""The benchmark of one accelerator runs at toy size, and keeps to the time and memory it has."""

import json
import re
import subprocess
import sys

import pytest
from runs import ROOT, environment

from benchmarks import cases


def test_toy(tmp_path):
    output = tmp_path / "accelerator.json"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--toy", f"--output={output}"]
    command += ["--models=llama-3b", "--only=ceilings,train,attention,decode"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["versions"]["jax"] and result["device"]["platform"] == "cpu"
    assert result["ceilings"]["copy_gigabytes_per_second"]["median"] > 0
    train = result["train"]["llama-3b"]
    assert "skipped" not in train, train
    assert train["tokens_per_second"]["median"] > 0 and train["out_of_memory_at_rows"] == []
    assert 5 < train["loss"] < 6  # ln 256 = 5.5: tokens are random
    # Both conventions differ by half of the attention, 6 M H Dh L of these FLOPs a token.
    per_token = train["model_tflops"] * 1e12 / train["tokens_per_second"]["median"]
    half = 6 * 2 * 4 * 8 * 128
    causal_share = train["mfu_causal"] / train["mfu_full"]
    assert causal_share == pytest.approx(1 - half / per_token, rel=1e-6)
    said = {r["implementation"]: r for r in result["attention"]["rows"]}
    assert said["cudnn"]["refused"] == "the backend is cpu" and said["xla"]["tflops"]["median"] > 0
    decode = result["decode"]["gpt2-124m"]["rows"]
    assert [r["rows"] for r in decode] == [1, 8]
    # 2 layers of q, o, k, v and the MLP, and the tied head, in float32, are read once a token, and
    # a few biases and norms; with the table of positions it would be 18 % more.
    matrices = 4 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 64) + 32 * 256)
    assert matrices < decode[0]["weight_bytes"] < 1.05 * matrices
    assert decode[0]["cache_bytes_per_row"] == 2 * 2 * 2 * 8 * 4 * (32 + 16)
    for line in ("bfloat16 matmul", "train llama-3b: ", "refused: the backend is cpu", "8 rows: "):
        assert line in done.stdout


def test_half_the_rows_until_they_fit():
    def attempt(rows):
        return {"out_of_memory": "no room"} if rows > fits else {"rows": rows}

    fits = 12
    assert cases.most_rows(64, attempt) == {"rows": 8, "out_of_memory_at_rows": [64, 32, 16]}
    fits = 0
    assert cases.most_rows(2, attempt) == {"skipped": "out of memory with [2, 1] rows: no room"}


def test_less_memory_starts_with_fewer_rows():
    start = [cases.rows_to_try(64, gb * 1e9, 140e9) for gb in (192, 140, 80, 32, 16, 0.1)]
    assert start == [64, 64, 32, 16, 8, 1]
    assert cases.rows_to_try(64, None, 140e9) == 64


@pytest.mark.parametrize(
    ("program", "minutes", "least", "why"),
    [
        ("print(1)", 0.01, 20, "1 s are left of --minutes=0.01, it needs at least 20 s"),
        ("import time; time.sleep(60)", 0.01, 0, "not done after 1 s, all that --minutes left"),
        ("raise ValueError('broken')", 1, 0, "exit status 1: .*ValueError: broken"),
    ],
)
def test_what_is_skipped_says_why(program, minutes, least, why):
    result = cases.run_case([sys.executable, "-c", program], {}, cases.Clock(minutes), least)
    assert re.search(why, result["skipped"])


def test_what_was_measured_before_the_time_ran_out_is_kept():
    program = "import time; print('{\"rows\": [1]}', flush=True); time.sleep(60)"
    result = cases.run_case([sys.executable, "-c", program], {}, cases.Clock(0.03), 0)
    assert result["rows"] == [1] and "not done after 2 s" in result["cut_short"]


def test_time_is_kept_for_what_follows():
    result = cases.run_case([sys.executable, "-c", "print(1)"], {}, cases.Clock(1), 20, reserve=50)
    assert "60 s are left of --minutes=1 and 50 s are kept for what follows" in result["skipped"]


def test_the_last_line_of_a_case_is_its_result():
    program = "print('loading'); print('{\"a\": 1}')"
    assert cases.run_case([sys.executable, "-c", program], {}, cases.Clock(1), 0) == {"a": 1}
