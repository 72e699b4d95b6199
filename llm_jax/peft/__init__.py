"""Parameter-efficient tuning: tree -> tree transforms of the weight leaves in `llm_jax.nn`.

A method is a module with

    specs(base_specs, cfg) -> tree[ParamSpec]    what is trained, declared
    attach(base, trained, cfg) -> tree           the whole tree that models take

and, where what is trained does not start from its specs' `init`, `start(base, trained, key, cfg)`.
"""
