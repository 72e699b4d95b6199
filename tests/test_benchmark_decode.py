"""The benchmark of generation, our side at toy size, and its summary of both sides."""

import json
import subprocess
import sys

import pytest

from benchmarks import decode_cpu, record


def test_toy_run_of_our_side(tmp_path):
    output = tmp_path / "out.json"
    command = "-m benchmarks.decode_cpu --only=ours --toy --batch_sizes=2".split()
    done = subprocess.run(
        [sys.executable, *command, f"--output={output}"],
        cwd=record.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    ours = result["batches"]["2"]["ours"]
    assert ours["tokens_per_second"]["count"] == result["config"]["repeats"] == 2
    assert 0 < ours["first_token_seconds"]["median"] < ours["first_call_seconds"][0]
    assert result["config"]["new_tokens"] == 6 and "llm_jax" in done.stdout
    assert "tokens_per_second_ratio" not in result["batches"]["2"]


def test_summary_counts_all_rows_and_divides_ours_by_the_peers():
    def process(seconds, first):
        result = {"seconds": seconds, "first_token_seconds": first, "first_call_seconds": 9.0}
        return {"results": {"4": result}}

    runs = {
        "ours": [process([1.0, 2.0, 1.0], [0.1]), process([2.0], [0.1])],
        "peer": [process([4.0], [0.3]), process([6.0], [0.3])],
    }
    batch = decode_cpu.summarise(runs, {"batch_sizes": [4], "new_tokens": 10})["4"]
    assert batch["ours"]["tokens_per_second"]["range"] == [20.0, 40.0]  # not 5 to 10: 4 rows
    assert batch["tokens_per_second_ratio"]["range"] == [3.0, 4.0]  # 40 / 10 and 20 / 6.67
    assert batch["first_token_speedup"]["ratio"] == pytest.approx(3.0)  # not a third


def test_tokens_that_part_are_shown_with_their_logit_gap(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_cpu, "BATCH_SIZES", type("Flag", (), {"value": ["2"]}))
    monkeypatch.setattr(decode_cpu, "REPEATS", type("Flag", (), {"value": 1}))
    decode_cpu.write_task(tmp_path, toy=True)
    best = decode_cpu.work(tmp_path)["results"]["2"]["tokens"]
    assert decode_cpu.compare(tmp_path, best, best) == {"equal": True}
    other = [best[0], [*best[1][:3], (best[1][3] + 1) % 61, *best[1][4:]]]
    found = decode_cpu.compare(tmp_path, best, other)
    assert (found["equal"], found["row"], found["token"]) == (False, 1, 3)
    assert found["logit_gap"] > 0  # ours took the highest
    assert decode_cpu.compare(tmp_path, other, best)["logit_gap"] == -found["logit_gap"]


def test_the_peers_python_is_checked():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode_cpu", "--toy", "--peer_python=/none"],
        cwd=record.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "error: --peer_python=/none" in done.stderr
