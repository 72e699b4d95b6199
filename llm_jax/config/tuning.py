"""Tuning few parameters in place of all, and how the others are held.

No `Literal` and no postponed annotations in this file: ml_collections reads the types at run time.
"""

from llm_jax.config.base import Config, settings


@settings
class PeftConfig(Config):
    """Parameter-efficient tuning (llm_jax/peft). The model's own parameters are frozen then."""

    method: str = "none"  # none | lora | adapter (bottleneck) | prompt | prefix
    # Which matrices get a LoRA: a pattern that is searched in their paths.
    targets: str = r"/(attn|mlp)/\w+/w$"
    rank: int = 16  # of a LoRA; width of an adapter's bottleneck
    alpha: float = 32.0  # a LoRA is scaled by alpha / rank, or by alpha / sqrt(rank)
    rank_stabilized: bool = False  # the latter (Kalajdzievski 2023)
    dropout: float = 0.0  # of a LoRA's or an adapter's input
    tokens: int = 20  # virtual tokens of a prompt or prefix
    # What a prompt or prefix starts as, repeated to fill its tokens; "": rows of the vocabulary at
    # random (prompt), noise (prefix).
    start_text: str = ""
    start_ids: tuple = ()  # its tokens, filled in by a run
    also: tuple = ()  # patterns of the model's own parameters that are trained whole beside them
    base: str = "float"  # how frozen matrices are held: float | int8 (by channel) | nf4 (QLoRA)
    base_block: int = 64  # nf4: weights that share a constant
    base_double: bool = True  # nf4: the constants are quantised too
    base_targets: str = r"/(attn|mlp)/\w+/w$"  # which matrices


@settings
class DistillConfig(Config):
    """Distillation from a larger model (llm_jax/compression/distill.py)."""

    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jsd, teacher against student
    beta: float = 0.5  # of jsd: the teacher's share of the mixture that both are compared with
    temperature: float = 2.0  # of both distributions; the divergence counts temperature^2 times
    alpha: float = 0.5  # share of the divergence in the loss; the rest is cross-entropy
    # The teacher's most probable tokens that are kept on disk, so that it is out of memory in
    # training; 0: it runs in every step, and its whole distribution counts.
    top_k: int = 0
