"""Looking at activations inside a model that does not return them.

The model marks what may be looked at with `jax.ad_checkpoint.checkpoint_name`, which costs nothing
when nobody looks.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from llm_jax.types import Array


def record(f: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, list[Array]]]]:
    """f -> a function that returns (what f returns, {name: marked values in order of computation}).

    Marks inside of loops (`lax.scan`), rematerialised or jitted functions are not seen: run the
    layers with model.scan=False and model.remat=none.
    """

    def recorded(*args: Any) -> tuple[Any, dict[str, list[Array]]]:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        marks = [e for e in closed.jaxpr.eqns if e.primitive.name == "name"]
        # The same program with more results: those of its marks.
        more = closed.jaxpr.replace(outvars=[*closed.jaxpr.outvars, *(e.outvars[0] for e in marks)])
        run = core.jaxpr_as_fun(core.ClosedJaxpr(more, closed.consts))
        outs = run(*jax.tree.leaves(args))
        n = len(outs) - len(marks)
        found: dict[str, list[Array]] = {}
        for mark, value in zip(marks, outs[n:], strict=True):
            found.setdefault(mark.params["name"], []).append(value)
        return jax.tree.unflatten(jax.tree.structure(shape), outs[:n]), found

    return recorded
