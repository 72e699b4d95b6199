"""Fused attention kernels that ship with JAX: cuDNN and Pallas on NVIDIA GPUs, Splash on TPUs.

They hold no [L, S] array (Dao et al. 2022, arXiv 2205.14135). Each function has the arguments and
the result of `reference`; `refuses` says beforehand why one cannot do a call. Their outputs, and
what their backward passes need besides q, k and v, bear the name "attention", by which
model.remat=attention keeps them: named alone, an output would be kept and the kernel run again.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llm_jax import sharding
from llm_jax.nn.blockwise import Mask, Shape
from llm_jax.nn.ring import KEYS, QUERIES, TOKENS, context_size
from llm_jax.types import Array, PyTree

PLATFORMS = {"cudnn": "gpu", "pallas": "gpu", "splash": "tpu"}
MODULES = {
    "pallas": "jax.experimental.pallas.ops.gpu.attention",
    "splash": "jax.experimental.pallas.ops.tpu.splash_attention",
}
LANES = 128  # both Pallas kernels work on blocks of so many queries and keys, Splash of up to 512
NAME = "attention"
Segments = tuple[Array, Array] | None  # of queries [B, L] and of keys [B, L]


def refuses(name: str, q: Array, k: Array, mask: Mask, shape: Shape) -> str:
    """Why the kernel of that name cannot do this call; empty if it can."""
    platform = sharding.platform()
    if platform != PLATFORMS[name]:
        return f"the backend is {platform}"
    if platform == "gpu" and (capability := _compute_capability()) and capability < (8, 0):
        return f"the GPU's compute capability is {'.'.join(map(str, capability))}, below 8.0"
    if context_size() > 1:
        return f"mesh.context={context_size()} cuts rows along their length"
    if mask.cached:
        return "it is a cached call"
    if mask.parents is not None:
        return "answers share their prompt's tokens (data.preference.shared_prompt)"
    if platform == "gpu" and q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the compute type is {q.dtype}, not bfloat16"
    checks = {"cudnn": _cudnn_refuses, "pallas": _pallas_refuses, "splash": _splash_refuses}
    return checks[name](q, k, mask, shape)


def _cudnn_refuses(q: Array, k: Array, mask: Mask, shape: Shape) -> str:
    if shape.softcap:
        return "attention_softcap is set"
    if mask.segments is not None:
        return "rows hold several documents (data.isolate_documents)"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim={q.shape[-1]} is not a multiple of 8 up to 128"
    if shape.window and not shape.causal:
        return "a window without causality looks ahead"
    return ""


def _pallas_refuses(q: Array, k: Array, mask: Mask, shape: Shape) -> str:
    if shape.softcap:
        return "attention_softcap is set"
    if shape.window:
        return f"model.window={shape.window} is set"
    if mask.segments is not None and not shape.causal:
        return "queries and keys may be of different rows, which causal ones are not"
    if q.shape[-1] % 16 or q.shape[-1] > 128:
        return f"head_dim={q.shape[-1]} is not a multiple of 16 up to 128"
    return _blocks_refuse("pallas", q, k)


def _splash_refuses(q: Array, k: Array, mask: Mask, shape: Shape) -> str:
    return _blocks_refuse("splash", q, k)


def _blocks_refuse(name: str, q: Array, k: Array) -> str:
    L, S, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if L != S:
        return f"{L} queries meet {S} keys"
    if L % LANES:
        return f"length={L} is not a multiple of {LANES}"
    mesh = sharding.ambient_mesh()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    if heads % tensor or kv_heads % tensor:
        return f"mesh.tensor={tensor} does not divide {heads} heads and {kv_heads} key heads"
    try:
        _module(name)
    except ImportError:
        return f"jax {jax.__version__} has no {MODULES[name]}"
    return ""


def _module(name: str) -> ModuleType:
    with warnings.catch_warnings():  # that the GPU's kernel will leave JAX; `refuses` says so then
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(MODULES[name])


def _compute_capability() -> tuple[int, ...] | None:
    """That of the GPUs here; None where the program is compiled for others."""
    if jax.default_backend() != "gpu":
        return None
    text = getattr(jax.local_devices()[0], "compute_capability", "")
    return tuple(int(n) for n in text.split(".")) if text else None


def _check(name: str, q: Array, k: Array, mask: Mask, shape: Shape) -> None:
    if reason := refuses(name, q, k, mask, shape):
        raise ValueError(
            f"model.attention={name} is not available: {reason}; use model.attention=auto"
        )


def cudnn(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    """cuDNN's fused attention (NVIDIA GPUs). JAX's public function offers no packed documents.

    Raises:
      ValueError: it cannot do this call, and why.
    """
    _check("cudnn", q, k, mask, shape)
    kernel = partial(
        jax.nn.dot_product_attention,
        scale=shape.scale,
        is_causal=shape.causal,
        local_window_size=(shape.window - 1, 0) if shape.window else None,
        implementation="cudnn",
    )
    return _named(lambda q, k, v, _: kernel(q, k, v), q, k, v, None)


def pallas(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    """JAX's Pallas kernel for NVIDIA GPUs: slower than cuDNN, but keeps packed documents apart.

    Raises:
      ValueError: it cannot do this call, and why.
    """
    _check("pallas", q, k, mask, shape)
    return run_pallas(q, k, v, mask, shape)


def splash(q: Array, k: Array, v: Array, mask: Mask, shape: Shape) -> Array:
    """Splash attention (TPUs): skips the blocks of keys that a causal mask or a window hides.

    Raises:
      ValueError: it cannot do this call, and why.
    """
    _check("splash", q, k, mask, shape)
    return run_splash(q, k, v, mask, shape)


def run_pallas(
    q: Array, k: Array, v: Array, mask: Mask, shape: Shape, *, interpret: bool = False
) -> Array:
    """`pallas` on any backend; `interpret` computes the kernel's blocks with plain operations."""
    module = _module("pallas")
    G = q.shape[2] // k.shape[2]
    sizes = module.BlockSizes.get_default()

    def kernel(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        ids = None if segments is None else segments[0]
        options = {"sm_scale": shape.scale, "causal": shape.causal, "block_sizes": sizes}
        return module.mha(q, k, v, ids, **options, interpret=interpret)

    def local(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        k, v = (jnp.repeat(x, G, axis=2) for x in (k, v))  # the kernel has no grouped heads
        return _without_blind(_named(kernel, q, k, v, segments), segments, shape)

    return _over_rows_and_heads(local, q, k, v, mask)


def run_splash(
    q: Array, k: Array, v: Array, mask: Mask, shape: Shape, *, interpret: bool = False
) -> Array:
    """`splash` on any backend; `interpret` computes the kernel's blocks with plain operations."""
    module = _module("splash")
    L = q.shape[1]
    size = next(n for n in (512, 256, 128) if L % n == 0)
    forward = {"block_q": size, "block_kv": size, "block_kv_compute": size}
    keys = {"block_q_dkv": size, "block_kv_dkv": size, "block_kv_dkv_compute": size}
    sizes = module.BlockSizes(**forward, **keys, block_q_dq=size, block_kv_dq=size)
    if shape.window:
        sides = (shape.window - 1, 0 if shape.causal else shape.window - 1)
        visible = module.LocalMask((L, L), sides, 0)
    else:
        visible = (module.CausalMask if shape.causal else module.FullMask)((L, L))

    def kernel(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        one_row = module.make_splash_mha(
            module.MultiHeadMask([visible] * q.shape[1]),
            block_sizes=sizes,
            attn_logits_soft_cap=shape.softcap or None,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        ids = None if segments is None else module.SegmentIds(*segments)
        return jax.vmap(one_row)(q, k, v, ids)

    def local(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        q = q * jnp.asarray(shape.scale, q.dtype)  # the kernel does not scale
        o = _named(kernel, *(x.transpose(0, 2, 1, 3) for x in (q, k, v)), segments)
        return _without_blind(o.transpose(0, 2, 1, 3), segments, shape)

    return _over_rows_and_heads(local, q, k, v, mask)


def _without_blind(o_BxLxHxDh: Array, segments: Segments, shape: Shape) -> Array:
    """0 for queries that see no key, where the kernels give an average; no gradient from there.

    Those are padding, which the kernels let see itself, and where keys are of other rows the
    documents without any. In a causal row a token sees itself.
    """
    if segments is None:
        return o_BxLxHxDh
    q_segments, k_segments = segments
    sees = q_segments > 0
    if not shape.causal:
        sees &= jnp.any(q_segments[:, :, None] == k_segments[:, None, :], axis=-1)
    return jnp.where(sees[:, :, None, None], o_BxLxHxDh, 0)


def _over_rows_and_heads(local: Callable, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """`local(q, k, v, segments)` for the rows and heads of each device: XLA cannot cut a kernel."""
    segments = None if mask.segments is None else tuple(jnp.asarray(x) for x in mask.segments)
    mesh = sharding.ambient_mesh()
    if mesh is None:
        return local(q, k, v, segments)
    rows = math.prod(mesh.shape[a] for a in sharding.RULES["batch"])

    def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
        if q.shape[0] % rows:  # too few rows to cut: every device does all of them
            axes = (None, *axes[1:])
        return sharding.partition_spec(axes, mesh)

    documents = None if segments is None else (spec(TOKENS), spec(TOKENS))
    specs = (spec(QUERIES), spec(KEYS), spec(KEYS), documents)
    return sharding.over_mesh(local, specs, spec(QUERIES))(q, k, v, segments)


# Names for what a kernel's backward pass needs -----------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _named(kernel: Callable, q: Array, k: Array, v: Array, segments: Segments) -> Array:
    """kernel(q, k, v, segments); what its backward pass keeps besides q, k and v is named."""
    return kernel(q, k, v, segments)


def _named_forward(kernel: Callable, q: Array, k: Array, v: Array, segments: Segments) -> tuple:
    o, back = jax.vjp(lambda q, k, v: kernel(q, k, v, segments), q, k, v)
    named = checkpoint_name(o, NAME)

    def name(x: PyTree) -> PyTree:
        if x is o:
            return named
        return x if any(x is y for y in (q, k, v, *(segments or ()))) else checkpoint_name(x, NAME)

    return named, jax.tree.map(name, back)


def _named_backward(kernel: Callable, back: Callable, do: Array) -> tuple:
    return *back(do), None


_named.defvjp(_named_forward, _named_backward)
