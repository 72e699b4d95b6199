"""The chain of binaries as one script runs it: base model, assistant, reward, DPO, best-of-n."""

import json
import subprocess
import sys

import pytest
from preference_runs import write_dialogues, write_pairs
from runs import ROOT, environment, finish_job, flags_of, run_binary, start_job

SHORT = {
    "length": 320,
    "batch_size": 4,
    "optimizer.warmup_steps": 0,
    "eval.rows": 16,
    "eval.sample_tokens": 4,
    "log.compilation_cache": "",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder that the script leaves, at toy size."""
    out = tmp_path_factory.mktemp("chain")
    pairs, chats = write_pairs(out / "pairs.jsonl"), write_dialogues(out / "chats.jsonl")
    short = " ".join(flags_of(SHORT))
    env = environment(
        OUT=str(out),
        PYTHON=sys.executable,
        PAIRS=str(pairs),
        CHATS=str(chats),
        PRETRAIN="configs/smoke.py",
        PRETRAIN_FLAGS="--config.steps=8 --config.checkpoint.every=0 --config.eval.rows=8",
        SFT_FLAGS=f"{short} --config.steps=4",
        REWARD_FLAGS=f"{short} --config.steps=30 --config.optimizer.learning_rate=3e-3",
        DPO_FLAGS=f"{short} --config.steps=12 --config.dpo.sample_prompts=4 --config.eval.prompts=()",
        JUDGED="4",
        N="4",
        TOKENS="8",
    )
    script = str(ROOT / "experiments/launch/preferences.sh")
    done = subprocess.run(
        ["/bin/bash", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return out


def test_the_chain_from_nothing_to_a_policy(chain):
    reward, dpo = (
        json.loads((chain / run / "summary.json").read_text()) for run in ("reward", "dpo")
    )
    assert reward["eval/pair_accuracy"] > 0.8 and reward["eval_loss"] < 0.6
    assert dpo["eval_loss"] < dpo["eval_loss_at_start"]
    assert dpo["eval_loss_at_start"] == pytest.approx(0.6931, abs=1e-3)
    assert {"kl", "generated_tokens", "generated_tokens_before"} <= dpo.keys()
    report = (chain / "best_of_n/report.md").read_text()
    assert "plots/" in report and "dpo" in report


def test_rounds_on_the_policys_own_answers(chain, tmp_path):
    flags = flags_of({**SHORT, "steps": 2, "dpo.sample_prompts": 0})
    args = [
        "--config=configs/dpo_embedded.py",
        f"--init_from={chain / 'sft'}",
        f"--judge={chain / 'reward'}",
        f"--input={chain / 'pairs.jsonl'}",
        f"--workdir={tmp_path / 'run'}",
        "--prompts=4",
        "--answers=2",
        "--held_out=2",
        "--max_new_tokens=8",
        *flags,
    ]
    done = run_binary("align", *args, "--rounds=1")
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(x) for x in (tmp_path / "run/round-1/pairs.jsonl").open()]
    assert pairs and all(p["score_chosen"] > p["score_rejected"] for p in pairs)
    first = (tmp_path / "run/round-1/answers.jsonl").read_bytes()
    done = run_binary("align", *args, "--rounds=2")  # one more; the first stays as it is
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/round-1/answers.jsonl").read_bytes() == first
    rounds = json.loads((tmp_path / "run/results.json").read_text())["rounds"]
    assert [r["round"] for r in rounds] == [0, 1, 2] and "win_rate" in rounds[2]
    other = run_binary("align", *args, "--rounds=2", "--temperature=0.5")
    assert other.returncode == 1 and "was begun with temperature=1.0" in other.stderr


def test_a_reward_run_is_no_base_for_text(chain, tmp_path):
    done = run_binary("generate", f"--checkpoint={chain / 'reward'}", "--prompt=a")
    assert done.returncode == 1 and "a reward model judges texts and writes none" in done.stderr
    done = run_binary(
        "dpo",
        "--config=configs/dpo_embedded.py",
        f"--init_from={chain / 'reward'}",
        f"--input={chain / 'pairs.jsonl'}",
        f"--workdir={tmp_path}",
    )
    assert done.returncode == 1 and "is a reward model, which writes no text" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["reward", "dpo"])
def test_two_processes_learn_as_one(chain, tmp_path, verb):
    flags = flags_of({**SHORT, "steps": 6, "checkpoint.every": 0, "mesh.fsdp": 2, "mesh.data": 1})
    if verb == "dpo":
        flags += flags_of({"dpo.sample_prompts": 0, "dpo.reference": "cached"})
    args = [f"--config=configs/{verb}_embedded.py", f"--init_from={chain / 'sft'}", *flags]
    args.append(f"--input={chain / 'pairs.jsonl'}")
    alone = run_binary(verb, *args, f"--workdir={tmp_path / 'one'}", devices=2)
    assert alone.returncode == 0, alone.stderr
    job = start_job(2, verb, *args, f"--workdir={tmp_path / 'two'}")
    for code, _, err in finish_job(job):
        assert code == 0, err
    one, two = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "eval_loss", "eval/pair_accuracy", "eval/margin"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-5), key
