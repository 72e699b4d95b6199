"""A reward model on a backbone that stays as it is: features are computed once, then a head is fitted."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import config as configs
from llm_jax import models, report, sharding
from llm_jax.align import judgements
from llm_jax.align.held_out import summary_rows
from llm_jax.align.reward import splits
from llm_jax.align.reward.features import answers_of, joined, kept_features
from llm_jax.align.reward.linear import FOLDS, Head, choose, fit, held_out_loss, judged
from llm_jax.align.reward.training import check
from llm_jax.config import TrainConfig
from llm_jax.data.comparisons import Comparisons
from llm_jax.eval.output import write_json
from llm_jax.models import heads
from llm_jax.nn.params import count
from llm_jax.train import base_model, checkpoint, environment, inputs
from llm_jax.train.metrics import peak_memory
from llm_jax.types import Array, PyTree


def train(
    cfg: TrainConfig, workdir: str | Path, *, dry_run: bool = False, debug: bool = False
) -> dict[str, Any]:
    """Fits a head on the backbone that `cfg` starts from, and writes a reward model: a checkpoint of
    the whole model, summary.json and report.md. Returns the summary.

    Raises:
      ValueError, OSError: what the user can mend, in one line.
    """
    begin = time.perf_counter()
    check(cfg)
    if not cfg.checkpoint.init_from:
        raise ValueError("--init_from is needed: the model whose features are judged")
    if jax.process_count() > 1:
        raise ValueError("reward.backbone=features runs in one process; use reward.backbone=tuned")
    if cfg.peft.method != "none":
        raise ValueError(
            f"peft.method={cfg.peft.method} tunes the backbone, which reward.backbone=features leaves "
            "as it is; drop one of the two"
        )
    if debug:
        jax.config.update("jax_debug_nans", True)
    workdir, cfg.model.head = Path(workdir), heads.REWARD
    finished = workdir / "summary.json"
    if finished.is_file() and (workdir / "checkpoints").is_dir():
        print(f"this reward model is finished; for another choose another --workdir: {workdir}")
        return json.loads(finished.read_text())
    environment.use_compilation_cache(cfg.log.compilation_cache)
    workdir.mkdir(parents=True, exist_ok=True)
    if not cfg.tokenizer.path:
        tokenizer = base_model.load_tokenizer(cfg.checkpoint.init_from)
        cfg.tokenizer.path = base_model.keep_tokenizer(tokenizer, workdir)
    configs.validate(cfg)
    epochs, cfg.epochs = cfg.epochs, 0.0  # of a head there is no such thing
    fraction = cfg.data.eval_fraction
    if cfg.reward.splits:  # of all answers, whose features are computed once
        cfg.data.eval_fraction = 0.0
    corpus = inputs.prepare(cfg, workdir)
    cfg.epochs, cfg.data.eval_fraction = epochs, fraction
    configs.resolve_model(
        cfg.model,
        vocab_size=corpus.tokenizer.vocab_size,
        length=cfg.length,
        backend=jax.default_backend(),
    )
    if dry_run:
        for row in corpus.parts():
            print(row)
        return {}
    configs.freeze(cfg)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    model = models.family(cfg.model.family)
    with jax.set_mesh(mesh):
        path = cfg.checkpoint.init_from
        params = base_model.load_params(path, base_model.specs_of(path, cfg.model), mesh)
        params = heads.fitted(params, model.specs(cfg.model), jax.random.key(cfg.seed))
        summary, head, blocks = _fitted(
            cfg, corpus, model.cast(params, cfg.model.dtype), mesh, workdir
        )
    params = {**params, heads.REWARD: _as_params(head)}
    summary["params"] = count(model.specs(cfg.model))
    summary |= {"params_trained": len(head.w_D) + 1, **summary_rows(corpus)}
    summary["wall_seconds"] = time.perf_counter() - begin
    summary["peak_memory_bytes"] = peak_memory()
    environment.write(workdir, cfg, corpus.tokenizer.fingerprint(), {})
    checkpoint.save_params(workdir / "checkpoints", cfg, corpus.tokenizer, params)
    table = report.Table([{"what": k.replace("_", " "), "value": v} for k, v in summary.items()])
    config = report.Code((workdir / "config.json").read_text(), language="json")
    parts = [report.Text("## Data"), report.Table(corpus.parts()), report.Text("## Config"), config]
    report.write_report(workdir, f"Reward model: {cfg.name}", [table, *blocks, *parts])
    write_json(str(finished), summary)
    return summary


def _fitted(
    cfg: TrainConfig, corpus: Comparisons, params: PyTree, mesh: Any, workdir: Path
) -> tuple[dict[str, Any], Head, list[report.Block]]:
    folder = workdir / "data"
    rows = [
        answers_of(c.tokens, kept_features(c.tokens, params, cfg.model, cfg, mesh, folder))
        for c in corpus.train
    ]
    answers = rows[0] if len(rows) == 1 else joined(rows)
    if cfg.reward.splits:
        return splits.compare(answers, cfg)
    l2, tried = (cfg.reward.l2, []) if cfg.reward.l2 else choose(answers, cfg)
    head = fit(answers, cfg, l2)
    shorter = corpus.parts()[0]["shorter preferred"] >= 0.5
    train = judgements.measure(judged(head, answers), shorter_wins=shorter)
    summary = {"name": cfg.name, "l2": l2}
    summary["train/pair_accuracy"] = train.get("eval/pair_accuracy")
    blocks: list[report.Block] = []
    if tried:
        caption = f"Held-out loss in {FOLDS} folds of the training prompts"
        blocks.append(report.Table(tried, caption=caption))
    if corpus.evaluation is not None:
        x_NxD = kept_features(corpus.evaluation, params, cfg.model, cfg, mesh, folder)
        seen = answers_of(corpus.evaluation, x_NxD)
        found = judged(head, seen)
        summary["eval_loss"] = held_out_loss(head, seen, cfg)
        summary |= judgements.measure(found, shorter_wins=shorter)
        blocks += judgements.blocks(found, corpus.held_out)
    return summary, head, blocks


def _as_params(head: Head) -> dict[str, Array]:
    values = {"w": head.w_D, "bias": head.bias, "length": head.length}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
