"""How hub files write a config.json, and in which layouts they hold the tensors.

The cases vary head ratios, tying, biases, rope scalings, windows, caps, epsilons and odd
vocabularies, so that no shape is special. `old` is the style of files before transformers 5
(rope_theta and rope_scaling at the top level, torch_dtype), `new` the one it writes now
(rope_parameters, dtype). Keys that stand in real files and must change nothing are there too.

Layouts: "" the names transformers saves; "no_prefix" GPT-2's own files (no "transformer.", with the
causal mask as a tensor); "inv_freq" the files of Llama 2 (rotary frequencies as tensors); "mtp" the
files of GLM-4.5 (a further layer that predicts one more token, which the model itself leaves alone).
"""


def old(model, **keys) -> dict:
    """A config.json as before transformers 5."""
    return {"architectures": [model], "torch_dtype": "float32", **keys}


def new(model, rope=None, **keys) -> dict:
    """A config.json as transformers 5 writes it; `rope`: changes to plain RoPE of base 10000."""
    rope = rope or {}
    if "full_attention" not in rope:
        rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    return {"architectures": [model], "dtype": "float32", "rope_parameters": rope, **keys}


def sizes(hidden, layers, heads, kv, inner, vocab, **keys) -> dict:
    """The sizes every architecture but GPT-2 has; kv 0: the key is absent, as in Llama 1."""
    ratio = {"num_key_value_heads": kv} if kv else {}
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **ratio,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "initializer_range": 0.02,
        "use_cache": True,
        **keys,
    }


def change_layout(tensors, config, layout):
    """Other tensors for the same model: ((name, shape) ..., names that transformers leaves alone)."""
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if layout == "no_prefix":
        n = config["n_positions"]
        tensors = [(name.removeprefix("transformer."), shape) for name, shape in tensors]
        masks = [(f"h.{i}.attn.bias", [1, 1, n, n]) for i in range(layers)]
        return tensors + masks, [name for name, _ in masks]
    if layout == "inv_freq":
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        extra = [(f"model.layers.{i}.self_attn.rotary_emb.inv_freq", [half]) for i in range(layers)]
        return tensors + extra, [name for name, _ in extra]
    if layout == "mtp":
        d, above = config["hidden_size"], f"model.layers.{layers}."
        last = f"model.layers.{layers - 1}."
        extra = [(above + k.removeprefix(last), s) for k, s in tensors if k.startswith(last)]
        extra += [(above + "eh_proj.weight", [d, 2 * d])]
        extra += [(above + f"{k}.weight", [d]) for k in ("enorm", "hnorm", "shared_head.norm")]
        table = [config["vocab_size"], d]
        extra += [(above + f"{k}.weight", table) for k in ("embed_tokens", "shared_head.head")]
        return tensors + extra, [name for name, _ in extra]
    return tensors, []


def gpt2(embd, layers, heads, vocab, **keys) -> dict:
    """GPT-2 has names of its own."""
    base = {"n_embd": embd, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    common = {"n_positions": 32, "n_ctx": 32, "activation_function": "gelu_new"}
    rest = {"layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    return old("GPT2LMHeadModel", model_type="gpt2", **base, **{**common, **rest, **keys})


def llama3(factor, original, low=1.0, high=4.0) -> dict:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def yarn(factor, original, **keys) -> dict:
    return {"factor": factor, "original_max_position_embeddings": original, **keys}
