"""The model that a run starts from (`checkpoint.init_from`): a run of ours, or one of another format."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax import models
from llm_jax.config import ModelConfig, MoEConfig, TrainConfig
from llm_jax.data.prepare import save_tokenizer
from llm_jax.interop import peft_format, pretrained
from llm_jax.interop.weights import Hold
from llm_jax.models import heads
from llm_jax.nn.params import digest, fingerprint, flatten, unflatten
from llm_jax.peft import lora
from llm_jax.train import checkpoint, distributed
from llm_jax.train.tuning import make_tuning
from llm_jax.types import PyTree

# How a model is computed and trained is the recipe's; everything else comes with the weights.
RECIPES = (
    "dtype",
    "attention",
    "attention_block",
    "scan",
    "scan_unroll",
    "remat",
    "head_chunk",
    "pipeline_microbatches",
    "pipeline_turns",
    "dropout",
    "embed_noise",
    "cache_dtype",
    "head",
)
RECIPES_EXPERTS = ("implementation", "dispatch", "capacity_factor", "chunk")


def adopt(cfg: TrainConfig, path: str | Path, asked: Iterable[str] = ()) -> None:
    """Makes a recipe go on from the model at `path`, in place: its architecture, its weights, its
    tokenizer, and how its texts start and end. Of a run it is the last step that counts now.

    Args:
      asked: keys of `cfg` that the user has set ("model.dtype").

    Raises:
      FileNotFoundError: as `llm_jax.load` does.
      ValueError: so too; an adapter's folder; a key in `asked` that the model at `path` decides.
    """
    own = [f"model.{name}" for name in RECIPES] + [f"model.moe.{name}" for name in RECIPES_EXPERTS]
    for key in asked:
        if key.startswith(("model.", "tokenizer.")) and key not in own:
            raise ValueError(
                f"--config.{key} is decided by --init_from={path}, whose weights and tokenizer go on; "
                "drop one of the two"
            )
    if peft_format.is_folder(path):
        raise ValueError(
            f"--init_from={path} is an adapter; merge it first: python -m experiments.convert "
            f"--from=peft --input={path} --to=llm_jax --output=DIR"
        )
    path = Path(path).expanduser().absolute()
    if pretrained.kind(path):
        found = pretrained.load(path, None)
        model, adds_bos, ends, stop = found.model, found.adds_bos, found.end_tokens, ()
    else:
        folder, step = checkpoint.locate(path)
        path = folder / str(step)
        base = checkpoint.load_config(path)
        model, adds_bos = configs.thaw(base.model), base.data.add_bos
        ends, stop = base.tokenizer.end_tokens, base.tokenizer.stop
    if model.head != "lm" and cfg.model.head == "lm":
        raise ValueError(
            f"--init_from={path} is a reward model, which writes no text; give a language model"
        )
    for name in RECIPES:
        setattr(model, name, getattr(cfg.model, name))
    experts: MoEConfig = model.moe
    for name in RECIPES_EXPERTS:
        setattr(experts, name, getattr(cfg.model.moe, name))
    cfg.model = model
    cfg.data.add_bos, cfg.tokenizer.end_tokens, cfg.tokenizer.stop = adds_bos, ends, stop
    cfg.checkpoint.init_from, cfg.tokenizer.path = str(path), ""


def load_tokenizer(path: str | Path) -> Any:
    """Its tokenizer."""
    if pretrained.kind(path):
        return pretrained.load(path, None).tokenizer
    return checkpoint.load_tokenizer(path)


def keep_tokenizer(tokenizer: Any, workdir: Path) -> str:
    """Makes it that of a run in `workdir`, in place of another; returns its folder."""
    folder = str(workdir / "tokenizer")
    return distributed.from_main("tokenizer", lambda: save_tokenizer(tokenizer, folder) or folder)


def specs_of(path: str | Path, model: ModelConfig) -> PyTree:
    """The specs of the model at `path`: those of `model`, but for its head."""
    own = configs.thaw(model)
    theirs = pretrained.load(path, None) if pretrained.kind(path) else checkpoint.load_config(path)
    own.head = theirs.model.head
    return models.family(own.family).specs(configs.freeze(own))


def load_base(
    path: str | Path, specs: PyTree, mesh: jax.sharding.Mesh, hold: Hold
) -> tuple[PyTree, str]:
    """`load_params`, and the fingerprint of the parameters as they were before `hold`."""
    seen = {}

    def watched(name: str, leaf: PyTree) -> PyTree:
        seen[name] = digest(leaf)
        return hold(name, leaf)

    params = load_params(path, specs, mesh, watched)
    return params, fingerprint(unflatten(seen))


def load_params(
    path: str | Path, specs: PyTree, mesh: jax.sharding.Mesh, hold: Hold | None = None
) -> PyTree:
    """Its parameters as plain arrays in float32, cut for `mesh`: of a run with PEFT its base's with
    what it learned added. `hold` makes a leaf of each, of other formats' as it is read.

    Raises:
      ValueError: they are not those of `specs`; the message names the first.
    """
    if pretrained.kind(path):
        params = pretrained.load(path, mesh, hold=hold).params
        checkpoint.check_shapes(specs, params, str(path))
        return params
    cfg = checkpoint.load_config(path)
    if cfg.peft.method == "none":
        params = checkpoint.load_params(path, specs, mesh)
    else:
        trained = load_trained(path, cfg, mesh)
        below = base_of(path, cfg)
        base = load_params(below, specs_of(below, cfg.model), mesh)
        check_base(path, cfg, base)
        params = lora.merge(tuned(base, trained, cfg))
        checkpoint.check_shapes(specs, params, str(path))
    if hold is None:
        return params
    return unflatten({name: hold(name, leaf) for name, leaf in flatten(params).items()})


def base_of(path: str | Path, cfg: TrainConfig) -> Path:
    """The model that a run with PEFT, whose config is `cfg`, was started from.

    Raises:
      FileNotFoundError: it is gone.
    """
    base = Path(cfg.checkpoint.init_from)
    if not base.exists():
        raise FileNotFoundError(
            f"{path} holds what peft.method={cfg.peft.method} trained on {base}, which is not there; "
            "say where it is now with --base (base=)"
        )
    return base


def check_base(path: str | Path, cfg: TrainConfig, params: PyTree) -> None:
    """Raises ValueError if a run with PEFT, whose config is `cfg`, was trained on other parameters."""
    if fingerprint(params) != checkpoint.load_identity(path).get(checkpoint.BASE):
        raise ValueError(
            f"{path} was trained on other weights than these: on {cfg.checkpoint.init_from} as it was "
            "then; name a copy of that model with --base (base=), or tune anew"
        )


def load_trained(path: str | Path, cfg: TrainConfig, mesh: jax.sharding.Mesh) -> PyTree:
    """What a run with PEFT, whose config is `cfg`, trained."""
    specs = models.family(cfg.model.family).specs(cfg.model)
    return checkpoint.load_params(path, make_tuning(cfg, specs).trained, mesh)


def tuned(params: PyTree, trained: PyTree, cfg: TrainConfig) -> PyTree:
    """A base's parameters with what PEFT trained on them, as `cfg.peft` says: a tree of leaves that
    shares the base's arrays, but for those that it holds in another type.

    Raises:
      ValueError: the base has other shapes than `cfg.model`.
    """
    specs = models.family(cfg.model.family).specs(cfg.model)
    params = heads.fitted(params, specs, jax.random.key(0))
    checkpoint.check_shapes(specs, params, "the base")
    tuning = make_tuning(cfg, specs)
    _, frozen = tuning.split(params, jax.random.key(0))
    return tuning.join(trained, frozen)
