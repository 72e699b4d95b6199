"""IsoFLOP sweep up to 1e20 FLOPs and 4 billion parameters, a slice of a pod for each model.

    python -m experiments.sweep --config=configs/sweep_pod.py --output=/mnt/runs/sweep \
        --input='data/*.parquet' --config.run.tokenizer.path=tokenizer.json --print_commands \
        > commands.txt
    experiments/launch/gke_xpk.sh sweep commands.txt
    python -m experiments.fit_scaling --input=/mnt/runs/sweep --law=all --output=/mnt/runs/law

Five budgets from 1e18 to 1e20 FLOPs; 8e20 FLOPs in all, by estimate 20 hours on slices that have
32 v5p chips together. Warm-up, stable, decay: a model is trained once, and its runs branch off.
With Slurm: sbatch --array, see experiments/launch/sweep.sbatch. Not run yet: no pod was at hand.
"""

from llm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from llm_jax.scaling.sweep.config import RateConfig, SweepConfig


def get_config() -> SweepConfig:
    return SweepConfig(
        name="sweep_pod",
        run=TrainConfig(
            batch_size=256,
            length=2048,
            z_loss=1e-5,
            model=ModelConfig(activation="gelu", vocab_multiple=128, remat="attention"),
            mesh=MeshConfig(data=1, fsdp=-1),
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=500),
            tokenizer=TokenizerConfig(kind="hf_bpe", vocab_size=32_768),
            data=DataConfig(inputs=("hf:HuggingFaceFW/fineweb-edu",), eval_fraction=0.001),
            eval=EvalConfig(every=0, rows=2048, sample_tokens=0),
            checkpoint=CheckpointConfig(every=500),
        ),
        widths=(384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048, 2304),
        aspect=64.0,
        head_dim=128,
        budgets=(1e18, 3e18, 1e19, 3e19, 1e20),
        min_ratio=2.7,
        max_ratio=120.0,
        rate=RateConfig(rule="power", reference=2e8, exponent=0.25),
    )
