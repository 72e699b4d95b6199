"""A matrix with a bottleneck adapter behind it (Houlsby et al. 2019), as a weight leaf."""

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.nn import weights
from llm_jax.nn.layers import dropout
from llm_jax.nn.weights import Weight
from llm_jax.types import Array


@flax.struct.dataclass
class Bottleneck:
    """y = x base + bias becomes y + gelu(y down + down_bias) up + up_bias."""

    base: Array | Weight  # [F, D]
    down: Array  # [D, r]
    down_bias: Array  # [r]
    up: Array  # [r, D]
    up_bias: Array  # [D]
    rate: float = flax.struct.field(pytree_node=False, default=0.0)  # dropout of what down sees
    salt: int = flax.struct.field(pytree_node=False, default=0)  # tells a layer's leaves apart
    keys_B: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.base.shape

    def matmul(self, x: Array) -> Array:
        """x [..., F] -> [..., D], without the adapter: it comes after the bias."""
        return weights.matmul(self.base, x)

    def after(self, y: Array) -> Array:
        """The product with its bias [..., D] -> the same with the adapter's update."""
        down, down_bias, up, up_bias = (
            a.astype(y.dtype) for a in (self.down, self.down_bias, self.up, self.up_bias)
        )
        x, lead = y, (None,) * (y.ndim - 1)
        if self.keys_B is not None and self.rate:
            rows_BxLxD = y.reshape(self.keys_B.shape[0], -1, y.shape[-1])
            x = dropout(rows_BxLxD, self.keys_B, self.rate, self.salt).reshape(y.shape)
        h = jax.nn.gelu(jnp.matmul(x, down) + down_bias[*lead, :], approximate=True)
        return y + (jnp.matmul(h, up) + up_bias[*lead, :])

    def rows(self, ids: Array) -> Array:
        """ids [...] -> [..., D], with the adapter."""
        return self.after(weights.rows(self.base, ids))

    def dequantize(self, dtype: str) -> Array:
        """Raises ValueError: no matrix does what an adapter does."""
        raise ValueError(
            "peft.method=adapter is no change of the model's matrices, so it cannot be merged or "
            "exported; keep its run's folder, or tune with peft.method=lora"
        )

    def seeded(self, keys_B: Array) -> "Bottleneck":
        """With dropout."""
        return self.replace(keys_B=keys_B) if self.rate else self

    def layout(self, axes: tuple[str | None, ...]) -> "Bottleneck":
        """Logical axes: along D as the matrix's columns are, whole along r."""
        base = self.base.layout(axes) if weights.is_weight(self.base) else axes
        *lead, _, width = axes
        return self.replace(
            base=base,
            down=(*lead, width, None),
            down_bias=(*lead, None),
            up=(*lead, None, width),
            up_bias=(*lead, None),
        )
