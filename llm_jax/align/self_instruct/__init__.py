"""Self-Instruct (Wang et al. 2023): a model writes instructions, inputs and answers from a few seed
tasks; what is malformed or too similar to what is there never enters the set."""

from llm_jax.align.self_instruct.rounds import Options, kept_tasks, run

__all__ = ["Options", "kept_tasks", "run"]
