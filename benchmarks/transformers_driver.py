"""Generation by transformers' GPT-2 with given weights, timed.

Runs under the peer's Python (torch, numpy and transformers; nothing of ours), with the project's
root as working directory:

    python -m benchmarks.transformers_driver FOLDER

FOLDER holds settings.json and weights.npz, which `benchmarks.decode_cpu` writes. The last line of
output is JSON.
"""

import json
import pathlib
import platform
import sys
import time

import numpy as np
import torch
import transformers

# Ours, one layer -> transformers', below "transformer.h.{i}.". Its Conv1D weights are [in, out], as
# ours; q, k and v are one matrix there.
LAYER = {
    "layers/attn_norm/scale": "ln_1.weight",
    "layers/attn_norm/bias": "ln_1.bias",
    "layers/attn/o/w": "attn.c_proj.weight",
    "layers/attn/o/bias": "attn.c_proj.bias",
    "layers/mlp_norm/scale": "ln_2.weight",
    "layers/mlp_norm/bias": "ln_2.bias",
    "layers/mlp/up/w": "mlp.c_fc.weight",
    "layers/mlp/up/bias": "mlp.c_fc.bias",
    "layers/mlp/down/w": "mlp.c_proj.weight",
    "layers/mlp/down/bias": "mlp.c_proj.bias",
}
JOINED = {
    **{f"layers/attn/{n}/w": "attn.c_attn.weight" for n in "qkv"},
    **{f"layers/attn/{n}/bias": "attn.c_attn.bias" for n in "qkv"},
}
REST = {
    "embed/tokens": "transformer.wte.weight",
    "embed/positions": "transformer.wpe.weight",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
}


def state_dict(ours: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Our weights by transformers' names."""
    if unknown := set(ours) - set(LAYER) - set(JOINED) - set(REST):
        raise ValueError(f"weights that the table does not name: {sorted(unknown)}")
    theirs = {REST[name]: ours[name] for name in REST}
    theirs["lm_head.weight"] = ours["embed/tokens"]
    for i in range(len(ours["layers/attn/q/w"])):
        layer = {their: ours[our][i] for our, their in LAYER.items()}
        for kind in ("w", "bias"):
            joined = np.concatenate([ours[f"layers/attn/{n}/{kind}"][i] for n in "qkv"], axis=-1)
            layer[JOINED[f"layers/attn/q/{kind}"]] = joined
        theirs |= {f"transformer.h.{i}.{name}": array for name, array in layer.items()}
    return {name: torch.from_numpy(array.copy()) for name, array in theirs.items()}


def build(ours: dict[str, np.ndarray], m: dict, attention: str) -> transformers.GPT2LMHeadModel:
    """The model with our weights, all of them and no others."""
    cfg = transformers.GPT2Config(
        vocab_size=m["vocab_size"],
        n_positions=m["max_length"],
        n_embd=m["d_model"],
        n_layer=m["n_layers"],
        n_head=m["n_heads"],
        layer_norm_epsilon=m["norm_eps"],
        activation_function="gelu_new",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    model = transformers.GPT2LMHeadModel(cfg).eval()
    model.load_state_dict(state_dict(ours), strict=True)
    return model


def generated(model: transformers.GPT2LMHeadModel, prompts: torch.Tensor, n: int) -> torch.Tensor:
    """n greedy tokens for each prompt [B, P] -> [B, n]."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return out[:, prompts.shape[1] :]


def seconds(model: transformers.GPT2LMHeadModel, prompts: torch.Tensor, n: int) -> float:
    """Wall time of one generation."""
    start = time.perf_counter()
    generated(model, prompts, n)
    return time.perf_counter() - start


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    s = json.loads((folder / "settings.json").read_text())
    with np.load(folder / "weights.npz") as f:
        ours = {name: f[name] for name in f.files}
    prompts = torch.tensor(s["prompts"])
    models = {name: build(ours, s["model"], name) for name in ("sdpa", "eager")}
    results = {}
    with torch.inference_mode():
        for size in s["batch_sizes"]:
            rows = prompts[:size]
            # The fastest of its attentions, on all cores and on one: small matrices lose by threads.
            tried = {}
            for threads in sorted({s["threads"], 1}):
                torch.set_num_threads(threads)
                for name, model in models.items():
                    seconds(model, rows, 4)
                    best = min(seconds(model, rows, s["trial_tokens"]) for _ in range(2))
                    tried[f"{name}, {threads} threads"] = size * s["trial_tokens"] / best
            fastest = max(tried, key=tried.get)
            name, threads = fastest.split(", ")
            torch.set_num_threads(int(threads.split()[0]))
            model, n = models[name], s["new_tokens"]
            start = time.perf_counter()
            tokens = generated(model, rows, n).tolist()
            first_call = time.perf_counter() - start
            results[str(size)] = {
                "tried_tokens_per_second": tried,
                "setting": fastest,
                "first_call_seconds": first_call,
                "seconds": [seconds(model, rows, n) for _ in range(s["repeats"])],
                "first_token_seconds": [seconds(model, rows, 1) for _ in range(s["repeats"])],
                "tokens": tokens,
            }
    versions = {
        "peer_python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"results": results, "versions": versions}))


if __name__ == "__main__":
    main()
