"""Recompute the goldens of `hf_tiny` with transformers (torch is needed only here).

PYTHONPATH=tests python tests/interop/goldens/make_goldens.py [ARCHITECTURE ...]

For every case it
  1. asks transformers for the names it saves, and checks that they are the names of hub files;
  2. loads our weights from that file, strictly;
  3. takes float32 logits (eager attention) of each prompt alone, and checks that a left-padded
     batch, and four more tokens through transformers' cache, agree with them;
  4. checks with float64 that no choice of an expert hangs on the last digit.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from cases_dense import DENSE
from cases_moe import MOE
from interop import hf_tiny
from safetensors import safe_open
from styles import change_layout

CASES = DENSE | MOE

LAYER = r"model\.layers\.\d+\."
ATTENTION = rf"{LAYER}self_attn\.(([qkvo]_proj\.(weight|bias))|([qk]_norm\.weight))"
NORMS = (
    rf"{LAYER}(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight"
    r"|model\.norm\.weight|model\.embed_tokens\.weight|lm_head\.weight"
)
MLP = rf"{LAYER}mlp\.(gate|up|down)_proj\.(weight|bias)"
EXPERTS = rf"{LAYER}mlp\.(experts\.\d+|shared_experts)\.(gate|up|down)_proj\.weight"
ROUTER = rf"{LAYER}mlp\.gate\.(weight|e_score_correction_bias)"
MIXTRAL = rf"{LAYER}block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight"
GPT2 = (
    r"transformer\.(wte|wpe)\.weight|transformer\.ln_f\.(weight|bias)|lm_head\.weight"
    r"|transformer\.h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))\.(weight|bias)"
)
HUB_NAMES = re.compile("|".join([ATTENTION, NORMS, MLP, EXPERTS, ROUTER, MIXTRAL, GPT2]))


def saved_tensors(config) -> list[tuple[str, list[int]]]:
    """(name, shape) of what save_pretrained writes for a model of this config."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            tensors = [(key, file.get_slice(key).get_shape()) for key in sorted(file.keys())]
    for name, _ in tensors:
        if not HUB_NAMES.fullmatch(name):
            raise ValueError(f"{name} is no name of a hub file")
    return tensors


def largest(a, b) -> float:
    """max |a - b|."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@torch.no_grad()
def run(folder, golden, dtype) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of the prompts alone and of the next tokens with a cache, after checking them."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    model.eval()
    # Of a layer too many, transformers names the experts after stacking them.
    above = f"model.layers.{model.config.num_hidden_layers}."
    unexpected = set(info["unexpected_keys"]) - set(golden.unused)
    wrong = {name for name in unexpected if not name.startswith(above)}
    wrong |= set(info["missing_keys"]) | set(info["mismatched_keys"])
    if wrong:
        raise ValueError(f"{golden.name}: {sorted(wrong)}")
    ids = [torch.tensor(np.r_[p, n])[None] for p, n in zip(golden.prompts, golden.next_tokens)]
    full = [model(x).logits[0].numpy() for x in ids]
    logits = [x[: len(p)] for x, p in zip(full, golden.prompts)]

    tokens, mask, positions = (torch.tensor(x, dtype=torch.long) for x in golden.padded())
    out = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
    for row, x in enumerate(logits):
        difference = largest(out.logits[row, -len(x) :], x)
        if difference > 2e-5:
            raise ValueError(f"{golden.name}: padding changes logits by {difference}")
    steps = []
    for i in range(golden.next_tokens.shape[1]):
        mask = torch.cat([mask, torch.ones((2, 1), dtype=torch.long)], 1)
        out = model(
            torch.tensor(golden.next_tokens[:, i : i + 1]),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        steps.append(out.logits[:, -1].numpy())
    steps = np.stack(steps, 1)
    for row, x in enumerate(full):
        difference = largest(steps[row], x[-steps.shape[1] :])
        if difference > 2e-5:
            raise ValueError(f"{golden.name}: the cache changes logits by {difference}")
    return logits, steps


def make(name: str, config: dict, layout: str, seed: int) -> tuple[dict, dict]:
    """The JSON and the arrays of one case."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        tensors = saved_tensors(transformers.AutoConfig.from_pretrained(folder))
        tensors, unused = change_layout(tensors, config, layout)
        rng = np.random.default_rng(seed)
        lengths, vocab = (21, 9), config["vocab_size"]
        golden = hf_tiny.Golden(
            name=name,
            config=config,
            tensors=tuple((key, tuple(shape)) for key, shape in tensors),
            unused=tuple(unused),
            seed=seed,
            versions={},
            prompts=tuple(rng.integers(1, vocab, length) for length in lengths),
            next_tokens=rng.integers(1, vocab, (2, 4)),
            logits=(),
            next_logits=np.zeros(0),
        )
        hf_tiny.write(folder, golden)
        logits, steps = run(folder, golden, torch.float32)
        precise, _ = run(folder, golden, torch.float64)
    rounding = max(largest(a, b) for a, b in zip(logits, precise))
    if rounding > 4e-5:
        raise ValueError(f"{name}: float64 gives logits {rounding} away; change the seed")
    spread = np.std(logits[0])
    if not 0.5 < spread < 10:
        raise ValueError(f"{name}: logits with a standard deviation of {spread} test little")
    print(f"{name:32} {len(tensors):4} tensors  std {spread:5.2f}  rounding {rounding:.1e}")
    case = {
        "config": json.dumps(config),
        "tensors": tensors,
        "unused": unused,
        "seed": seed,
        "prompts": [prompt.tolist() for prompt in golden.prompts],
        "next_tokens": golden.next_tokens.tolist(),
    }
    arrays = {f"{name}/{row}": x.astype(np.float32) for row, x in enumerate(logits)}
    return case, arrays | {f"{name}/next": steps.astype(np.float32)}


def main(architectures: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    for architecture in architectures or list(CASES):
        texts, arrays = {}, {}
        for number, (suffix, config, layout) in enumerate(CASES[architecture]):
            name = f"{architecture}-{suffix}"
            texts[name], new = make(name, config, layout, seed=number)
            arrays |= new
        np.savez_compressed(hf_tiny.FOLDER / f"{architecture}.npz", **arrays)
        text = json.dumps({"versions": versions, "cases": texts}, separators=(",", ":"))
        (hf_tiny.FOLDER / f"{architecture}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
