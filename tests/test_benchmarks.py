"""The benchmarks run at toy size, their files say what they should, and bounds are kept to.

What is computed is tested on numbers made up here; nothing is asserted of a time.
"""

import json
import subprocess
import sys

import pytest
from runs import ROOT, environment

from benchmarks import compile_worker, growth_worker

BINARIES = sorted(
    p.stem for p in (ROOT / "benchmarks").glob("*.py") if "    run_main(main)" in p.read_text()
)


def start(name, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def toy(name, folder, *flags):
    """The JSON of a run at toy size."""
    output = folder / "new" / "out.json"
    done = start(name, "--toy", f"--output={output}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()  # the table
    result = json.loads(output.read_text())
    assert set(result) > {"date", "versions", "device"}
    return result


@pytest.mark.parametrize("name", BINARIES)
def test_help(name):
    done = start(name, "--help")
    assert f"benchmarks.{name}" in done.stdout and "--output" in done.stdout, done.stderr


def test_train_cpu(tmp_path):
    found = toy("train_cpu", tmp_path, "--only=ours")["comparison"]["toy"]
    assert found["params"]["ours"] > 0 and found["tokens_per_second"]["ours"]["median"] > 0


def test_compile(tmp_path):
    result = toy("compile", tmp_path)
    assert [(p["layers"], p["how"]) for p in result["points"]] == [(1, "scan"), (1, "unrolled")]
    for p in result["points"]:
        assert p["trace_seconds"]["median"] > 0 and p["compile_seconds"]["median"] > 0
        assert p["peak_megabytes"]["median"] > p["peak_megabytes_before"]["median"] > 20
    (begun,) = result["starts"]
    # Everything that the first start compiled was there for the second.
    names = [name for name, _ in begun["warm_programs"]]
    assert [name for name, _ in begun["cold_programs"]] == names and "jit(train_step)" in names
    assert begun["warm_cache"] == {"hits": len(names), "misses": 0}
    seconds = begun["seconds"]
    for side in ("cold", "warm"):
        phases = [seconds[f"build: {p}"][side]["median"] for p in ("trace", "lower", "compile")]
        assert 0 < sum(phases) < seconds["build"][side]["median"]
        assert seconds["build"][side]["median"] < seconds["process"][side]["median"]
    assert result["warm_over_cold"] == seconds["build"]["ratio"]["ratio"]
    assert result["scan_growth_8_to_96"] is None  # not 1: neither was measured


def test_growth(tmp_path):
    result = toy("growth", tmp_path)
    assert [p["tokens"] for p in result["tokens"]["points"]] == [8, 16]
    short, long = result["length"]["none"]["points"]
    assert (short["length"], long["length"]) == (16, 32) and 0 < short["bytes"] < long["bytes"]
    assert result["length"]["none"]["ratios"] == [long["bytes"] / short["bytes"]]
    run = result["steps"]
    steps = [m["step"] for m in run["memory"]]
    assert run["steps"] == 16 and steps == sorted(steps) and max(steps) == 16
    assert 20 < run["last_half"]["lowest"] <= run["last_half"]["highest"]
    assert run["tokens_per_second"]["first_quarter"]["count"] == 3  # steps 2 to 4
    assert run["tokens_per_second"]["last_quarter"]["count"] == 4


def test_data(tmp_path):
    result = toy("data", tmp_path)
    assert len(result["speed"]) == 12  # packings x isolated or not x batch or iterator
    kinds = {r["kind"]: r for r in result["tokenizers"]}
    assert kinds["byte"]["bytes_per_token"] == 1.0 < kinds["hf_bpe"]["bytes_per_token"]
    # Both count the same seconds: text over ids is what a token stands for.
    for r in result["tokenizers"]:
        assert r["megabytes_per_second"] / r["million_tokens_per_second"] == pytest.approx(
            r["bytes_per_token"], rel=0.05
        )
    split, first_fit, pad = result["packing"]
    assert split["plan_seconds"] is None and first_fit["plan_seconds"] >= 0
    assert pad["utilisation"] < first_fit["utilisation"] <= split["utilisation"] == 1.0
    (memory,) = result["memory"]
    assert memory["megabytes"] == 1 and memory["load"]["RssAnon"] > 10


def test_parts_are_checked():
    for name, flag in (("data", "--kinds=bpe"), ("data", "--parts=sped"), ("growth", "--parts=x")):
        done = start(name, flag)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {flag}"), done.stderr
        assert len(done.stderr.splitlines()) == 1


def point(layers, scan, trace, compiled):
    run = {"trace_seconds": trace, "compile_seconds": compiled}
    run |= {"peak_megabytes": 2.0, "peak_megabytes_before": 1.0}
    return compile_worker.point(layers, scan, [run])


def test_growth_of_compile_time_is_that_of_scans_with_their_tracing():
    points = [point(8, True, 1.0, 3.0), point(96, True, 1.5, 4.5), point(96, False, 10.0, 90.0)]
    assert compile_worker.scan_growth(points, 8, 96) == 1.5  # not 25, of the unrolled
    points = [point(8, True, 1.0, 3.0), point(96, True, 3.0, 3.0)]
    assert compile_worker.scan_growth(points, 8, 96) == 1.5  # not 1, of compiling alone
    assert compile_worker.scan_growth(points, 4, 96) is None


def test_bounds_of_compile():
    good = {"scan_growth_8_to_96": 1.29, "warm_over_cold": None}
    assert compile_worker.missed(good) == []
    (line,) = compile_worker.missed(good | {"warm_over_cold": 0.25})  # has to be below
    assert "warm_over_cold" in line and "0.25" in line
    (line,) = compile_worker.missed(good | {"scan_growth_8_to_96": 12.0})
    assert "scan_growth_8_to_96 is 12.00" in line


def test_exponent_of_growth():
    sizes = [128, 256, 512, 1024]
    assert growth_worker.slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth_worker.slope(sizes, [2.0 + 0.1 * n for n in sizes]) < 0.95  # a fixed cost


def grown(*sizes):
    points = [{"length": 1024 * 2**i, "bytes": size} for i, size in enumerate(sizes)]
    return {"length": {"full": {"points": points, "ratios": growth_worker.ratios(points)}}}


def test_temporaries_may_double_with_the_length():
    assert growth_worker.missed(grown(10, 40, 80, 176)) == []  # up to 2k they may do more
    (line,) = growth_worker.missed(grown(10, 20, 40, 160))  # [L, L] scores somewhere
    assert "4.00" in line and "from length 4096 to 8192" in line and "remat full" in line
    assert growth_worker.missed(grown(10, 20, 60))[0].startswith("temporaries")  # from 2k on


def long_run(held, speed):
    """A run of 100 steps with memory `held(step)` and tokens/s `speed(step)`; then its report."""
    steps = range(1, 101)
    memory = [(float(s), s, held(s)) for s in steps] + [(101.0, 100, 900.0)]
    speeds = [(s, speed(s)) for s in steps]
    return {"steps": {"steps": 100} | growth_worker.summarise(100, memory, speeds)}


def test_a_long_run_is_flat_or_named():
    noise = lambda s: 1000.0 + s % 7  # noqa: E731
    flat = long_run(lambda s: 300.0 if s > 30 else 100.0, lambda s: 1.0 if s == 1 else noise(s))
    assert growth_worker.missed(flat) == []  # neither its start counts nor the report at its end
    assert flat["steps"]["last_half"] == {"samples": 50, "lowest": 300.0, "highest": 300.0}
    (line,) = growth_worker.missed(long_run(lambda s: 300.0 + 0.1 * s, noise))  # a leak
    assert "memory of the last half of 100 steps varies by 1.6%" in line
    slower = long_run(lambda s: 300.0, lambda s: noise(s) * (0.9 if s > 70 else 1.0))
    (line,) = growth_worker.missed(slower)
    assert "0.9" in line and "tokens/s" in line
    faster = long_run(lambda s: 300.0, lambda s: noise(s) * (1.1 if s > 70 else 1.0))
    assert growth_worker.missed(faster) == []
    with pytest.raises(RuntimeError, match="last half of 100 steps"):
        growth_worker.summarise(100, [(1.0, 3, 5.0)], [])


@pytest.mark.slow
def test_contamination(tmp_path):
    found = toy("contamination", tmp_path)
    assert [p["copies"] for p in found["power"]] == [1, 3, 10, 30] and len(found["rows"]) == 7
