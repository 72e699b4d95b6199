"""nanoGPT's GPU recipe: the larger character model of Shakespeare.

    python -m experiments.pretrain --config=configs/shakespeare_char_gpu.py --workdir=runs/shakespeare_gpu \
        --input=tinyshakespeare.txt

6 layers, 6 heads, 384 wide, context 256, batch 64, dropout 0.2, 5,000 steps: nanoGPT's README
gives a best validation loss of 1.4697 in 3 minutes on an A100. Two differences: dropout here acts on the
embedding and on what attention and MLP add to the residual stream, not on attention weights; and
the loss is over the whole validation text. Not run yet: no GPU was at hand.
"""

from configs import shakespeare_char
from llm_jax.config import TrainConfig, override


def get_config() -> TrainConfig:
    return override(
        shakespeare_char.get_config(),
        {
            "name": "shakespeare_char_gpu",
            "steps": 5000,
            "batch_size": 64,
            "length": 256,
            "model.d_model": 384,
            "model.n_layers": 6,
            "model.n_heads": 6,
            "model.dropout": 0.2,
            "model.dtype": "auto",
            "eval.every": 250,
            "eval.batch_size": 64,
            "eval.sample_tokens": 255,
            "checkpoint.every": 250,
        },
    )
