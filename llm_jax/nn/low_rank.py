"""A matrix with a low-rank update beside it (LoRA, Hu et al. 2021), as a weight leaf."""

import flax.struct
import jax.numpy as jnp

from llm_jax.nn import weights
from llm_jax.nn.layers import dropout
from llm_jax.nn.weights import Weight
from llm_jax.types import Array


@flax.struct.dataclass
class LowRank:
    """w = base + scale * a @ b, never added up: x w = x base + scale * (x a) b."""

    base: Array | Weight  # [D_in, D_out]
    a: Array  # [D_in, r]
    b: Array  # [r, D_out]
    scale: float = flax.struct.field(pytree_node=False)
    rate: float = flax.struct.field(pytree_node=False, default=0.0)  # dropout of what a sees
    salt: int = flax.struct.field(pytree_node=False, default=0)  # tells a layer's leaves apart
    keys_B: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    def matmul(self, x: Array) -> Array:
        """x [..., D_in] -> [..., D_out]."""
        y = weights.matmul(self.base, x)
        if self.keys_B is not None and self.rate:
            rows_BxLxD = x.reshape(self.keys_B.shape[0], -1, x.shape[-1])
            x = dropout(rows_BxLxD, self.keys_B, self.rate, self.salt).reshape(x.shape)
        h = jnp.matmul(x, self.a.astype(x.dtype))
        return y + jnp.matmul(h, self.scale * self.b.astype(x.dtype))

    def rows(self, ids: Array) -> Array:
        """ids [...] -> [..., D_out]; a's rows are those of the table."""
        y = weights.rows(self.base, ids)
        h = weights.rows(self.a, ids).astype(y.dtype)
        return y + jnp.matmul(h, self.scale * self.b.astype(y.dtype))

    def dequantize(self, dtype: str) -> Array:
        """The matrix with its update, added up in float32."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return (weights.dequantize(self.base, jnp.float32) + self.scale * a @ b).astype(dtype)

    def seeded(self, keys_B: Array) -> "LowRank":
        """With dropout."""
        return self.replace(keys_B=keys_B) if self.rate else self

    def layout(self, axes: tuple[str | None, ...]) -> "LowRank":
        """Logical axes: a is cut as the matrix's rows are, b as its columns."""
        base = self.base.layout(axes) if weights.is_weight(self.base) else axes
        a, b = (*axes[:-1], None), (*axes[:-2], None, axes[-1])
        return self.replace(base=base, a=a, b=b)
