"""Times training steps of nanoGPT's own model and optimizer on random tokens.

Runs under the peer's Python (torch and numpy), with the project's root as working directory:

    python -m benchmarks.nanogpt_step --repo=DIR --shape='{"layers": 4, ...}' --mode=float32
        --compiled --threads=2 --seconds=10

The last line of its output is JSON. The step is that of nanoGPT's train.py: forward and backward
pass, clipping, AdamW, gradients set to None.
"""

import argparse
import contextlib
import json
import platform
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--mode", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    a = parser.parse_args()

    import torch

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    sys.path.insert(0, a.repo)
    with contextlib.redirect_stdout(sys.stderr):
        from model import GPT, GPTConfig

        s = a.shape
        model = GPT(
            GPTConfig(
                block_size=s["length"],
                vocab_size=s["vocab"],
                n_layer=s["layers"],
                n_head=s["heads"],
                n_embd=s["width"],
                dropout=0.0,
                bias=False,
            )
        )
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    params = sum(p.numel() for p in model.parameters())
    step_model = torch.compile(model) if a.compiled else model
    x = torch.randint(0, s["vocab"], (s["batch"], s["length"]))
    y = torch.randint(0, s["vocab"], (s["batch"], s["length"]))

    def precision():
        if a.mode == "float32":
            return contextlib.nullcontext()
        return torch.amp.autocast("cpu", dtype=torch.bfloat16)

    def step() -> float:
        start = time.perf_counter()
        with precision():
            _, loss = step_model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start

    first = step()
    step()
    seconds, begin = [], time.perf_counter()
    while time.perf_counter() - begin < a.seconds or not seconds:
        seconds.append(step())
    big = torch.randn(2048, 2048)
    matmuls = []
    for _ in range(8):
        start = time.perf_counter()
        big @ big
        matmuls.append(time.perf_counter() - start)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(
        json.dumps(
            {
                "step_seconds": seconds,
                "first_step_seconds": first,
                "params": params,
                "matmul_gflops": 2 * 2048**3 / min(matmuls) / 1e9,
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
