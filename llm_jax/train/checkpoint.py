"""Checkpoints: everything a run needs to go on, and everything a later verb needs to start.

    DIR/<step>/params     the whole parameter tree (float32 masters); with PEFT what it trains
              /training   optimizer state, step, key, moving average
              /config     the run's config        /tokenizer  its files
              /data       what the order of the data depends on, with PEFT the base; and the step

A step folder is complete or absent: Orbax writes it under another name and renames it at the end.
Orbax is used here and nowhere else.
"""

import base64
import contextlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from llm_jax import config as configs
from llm_jax import sharding, tokenizers
from llm_jax.config import CheckpointConfig, MeshConfig, TrainConfig
from llm_jax.nn.params import abstract, flatten, unflatten
from llm_jax.train.optimizer import merge, partition
from llm_jax.train.tuning import without
from llm_jax.types import PyTree, TrainState

ITEMS = ("params", "training", "config", "tokenizer", "data")
BASE = "base"  # in "data": the fingerprint of what PEFT tunes


@contextlib.contextmanager
def _quiet():
    """Without Orbax's warnings about what is meant here: reading one item, and no metadata file."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints of one run, for writing and for resuming."""

    def __init__(
        self,
        directory: str | Path,
        cfg: TrainConfig,
        tokenizer: Any,
        data: dict,
        beside: Iterable[str] = (),
    ):
        """`beside`: names of the other models in the state's frozen part, which are not saved."""
        keep: CheckpointConfig = cfg.checkpoint
        self._beside = tuple(beside)
        self._cfg, self._tunes = cfg, cfg.peft.method != "none"
        self._data = {**data, "tokenizer": tokenizer.fingerprint()}
        self._tokenizer = _tokenizer_files(tokenizer)
        self.directory = Path(directory).absolute()
        policies = [LatestN(n=max(keep.keep_last, 1))]
        if keep.keep_best:
            policies.append(
                BestN(
                    get_metric_fn=lambda m: m["eval_loss"],
                    reverse=True,
                    n=keep.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = _Manager(
            self.directory,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies=policies),
                enable_async_checkpointing=keep.asynchronous,
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self, state: TrainState, step: int, eval_loss: float | None, *, wait: bool = False
    ) -> None:
        """Saves the state of `step`; returns before it is on disk unless `wait`.

        Raises:
          OSError: this save, or an earlier one that ran in the background, could not be written.
        """
        training = {
            "step": state.step,
            "key": jax.random.key_data(state.key),
            "opt_state": state.opt_state,
            "ema": state.ema,
            "carry": state.carry,
            "bad_steps": state.bad_steps,
        }
        items = {
            "params": ocp.args.StandardSave(self._saved(state)),
            "training": ocp.args.StandardSave(training),
            "config": ocp.args.JsonSave(configs.to_dict(self._cfg)),
            "tokenizer": ocp.args.JsonSave(self._tokenizer),
            "data": ocp.args.JsonSave({**self._data, "step": step}),
        }
        with self._named_errors(step):
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                return
            self._check_space(state)
            metrics = None if eval_loss is None else {"eval_loss": eval_loss}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
            if wait:
                self._manager.wait_until_finished()

    def _check_space(self, state: TrainState) -> None:
        # A write that fails half-way leaves pages of Orbax's and tensorstore's tracebacks.
        need = sum(x.nbytes for x in jax.tree.leaves(state))  # of all processes
        free = shutil.disk_usage(self.directory).free
        if need > free:
            raise OSError(
                f"No space left on device ({need / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free)"
            )

    def tunes(self, base: str) -> None:
        """Names the base, by its fingerprint: it is compared in `restore`, and saved."""
        self._data[BASE] = base

    def latest(self) -> int | None:
        """The last whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def _saved(self, state: TrainState) -> PyTree:
        """The parameters that a checkpoint holds: with PEFT not those of the base."""
        if self._tunes:
            return state.params
        return merge(state.params, without(state.frozen, self._beside))

    def restore(self, target: TrainState, step: int) -> TrainState:
        """The state saved at `step`, with the shapes and shardings of `target`, whatever mesh it
        was saved on. What is not saved of the frozen part, a PEFT's base or another model, is the
        `target`'s own.

        Raises:
          ValueError: the checkpoint is damaged, or belongs to another model, base, seed or data.
        """
        folder = self.directory / str(step)
        saved = _read_json(self.directory, step, "data")
        for name, value in json.loads(json.dumps(self._data)).items():
            if saved.get(name) != value:
                raise ValueError(
                    f"{folder} was trained with another {name}: {_short(saved.get(name))}, now {_short(value)}; "
                    "set it back, or start a new --workdir (with --config.checkpoint.init_from to keep the weights)"
                )
        whole = self._saved(target)
        check_shapes(whole, _metadata(self.directory, step), str(folder))
        key = jax.eval_shape(jax.random.key_data, target.key)
        training = {
            "step": target.step,
            "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=target.step.sharding),
            "opt_state": target.opt_state,
            "ema": target.ema,
            "carry": target.carry,
            "bad_steps": target.bad_steps,
        }
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(whole), training=ocp.args.StandardRestore(training)
        )
        try:
            out = self._manager.restore(step, args=args)
        except Exception as e:
            raise _damaged(folder, e) from e
        params, frozen = out.params, target.frozen
        if not self._tunes:
            params, own = partition(params, self._cfg.optimizer)
            others = {name: target.frozen[name] for name in self._beside}
            frozen = {**(own or {}), **others} or None
        rest = dict(out.training)
        key = jax.random.wrap_key_data(rest.pop("key"))
        return TrainState(params=params, frozen=frozen, key=key, **rest)

    def close(self) -> None:
        """Waits for what is being written. Raises OSError if it failed."""
        with self._named_errors(None):
            self._manager.wait_until_finished()
            self._manager.close()

    def _named_errors(self, step: int | None):
        return _SaveErrors(self, step)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """The loop decides when to stop; Orbax asking with another count would confuse jax's."""
        return False


class _SaveErrors:
    """Turns any failure of a save into one OSError that says what is safe and what to change."""

    def __init__(self, checkpoints: Checkpoints, step: int | None):
        self.checkpoints, self.step = checkpoints, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, Exception):
            return False
        directory = self.checkpoints.directory
        whole = sorted(_steps(directory))
        safe = (
            f"the last whole checkpoint is step {whole[-1]}"
            if whole
            else "there is no whole checkpoint yet"
        )
        raise OSError(
            f"cannot write a checkpoint to {directory}: {_first_line(error)}; {safe}; free space or move "
            "--workdir, then run the same command again to go on from there"
        ) from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + "..."


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    # tensorstore's messages carry the operating system's reason at their end.
    for reason in (
        "Permission denied",
        "File too large",
        "Read-only file system",
        "Disk quota exceeded",
    ):
        if reason in text:
            return reason
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [int(p.name) for p in directory.iterdir() if p.name.isdigit()]


def _damaged(folder: Path, error: BaseException) -> ValueError:
    others = sorted(s for s in _steps(folder.parent) if str(s) != folder.name)
    rest = f"to go on from step {others[-1]}" if others else "and start again"
    return ValueError(
        f"the checkpoint {folder} is damaged or half-written ({_first_line(error)}); delete that folder {rest}"
    )


def locate(path: str | Path) -> tuple[Path, int]:
    """(folder of checkpoints, step) for a run directory, its checkpoints folder, or one step folder.

    Raises:
      FileNotFoundError: there is no checkpoint there.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise FileNotFoundError(f"--checkpoint={path}: no such folder")
    if path.name.isdigit() and (path / "params").exists():
        return path.parent, int(path.name)
    for folder in (path / "checkpoints", path):
        if steps := _steps(folder):
            return folder, max(steps)
    raise FileNotFoundError(
        f"--checkpoint={path}: no checkpoint there; give a run directory, its checkpoints folder or a step folder"
    )


def _read_json(directory: Path, step: int, item: str) -> dict:
    folder = directory / str(step)
    try:
        with _quiet(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(folder / item)
    except Exception as e:
        raise _damaged(folder, e) from e


def _metadata(directory: Path, step: int) -> PyTree:
    """Saved shapes and types of the parameters."""
    try:
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.metadata(directory / str(step) / "params").item_metadata.tree
    except Exception as e:
        raise _damaged(directory / str(step), e) from e


def check_shapes(wanted: PyTree, saved: PyTree, where: str) -> None:
    """Raises ValueError naming the first parameter that is missing, unknown or of another shape."""
    wanted, saved = flatten(wanted), flatten(saved)
    for path in sorted(wanted.keys() | saved.keys()):
        if path not in saved:
            raise ValueError(f"{where} has no parameter {path!r}, which --config.model asks for")
        if path not in wanted:
            raise ValueError(f"{where} has a parameter {path!r} that --config.model does not know")
        if tuple(wanted[path].shape) != tuple(saved[path].shape):
            raise ValueError(
                f"{where}: {path!r} has shape {tuple(saved[path].shape)}, but --config.model makes it "
                f"{tuple(wanted[path].shape)}; give the architecture it was trained with"
            )


def save_params(directory: str | Path, cfg: TrainConfig, tokenizer: Any, params: PyTree) -> None:
    """Writes a checkpoint that others can start from and nothing can resume: step 0 of `directory`
    (a run's "checkpoints" folder), without an optimizer's state.

    Raises:
      OSError: it could not be written.
    """
    directory = Path(directory).absolute()
    items = {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(configs.to_dict(cfg)),
        "tokenizer": ocp.args.JsonSave(_tokenizer_files(tokenizer)),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with _Manager(directory, item_names=tuple(items), options=options) as manager:
        manager.save(0, args=ocp.args.Composite(**items))


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    return {n: base64.b64encode(b).decode() for n, b in tokenizer.files().items()}


def load_config(path: str | Path, cls: type = TrainConfig) -> TrainConfig:
    """The frozen config a checkpoint was trained with."""
    directory, step = locate(path)
    values = _read_json(directory, step, "config")
    return configs.freeze(configs.from_dict(cls, values, where=f"{directory / str(step)}/config"))


def load_identity(path: str | Path) -> dict[str, Any]:
    """What a run's data, and with PEFT its base, are known by."""
    return _read_json(*locate(path), "data")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer that a checkpoint carries."""
    directory, step = locate(path)
    files = _read_json(directory, step, "tokenizer")
    return tokenizers.from_files({n: base64.b64decode(b) for n, b in files.items()})


def load_params(path: str | Path, specs: PyTree, mesh: jax.sharding.Mesh | None = None) -> PyTree:
    """The parameters alone, cut for `mesh` (None: on the default device); the moving average where
    the run kept one. `specs` says which parameters are expected."""
    directory, step = locate(path)
    folder = directory / str(step)
    mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    target = abstract(specs, mesh)
    check_shapes(target, _metadata(directory, step), str(folder))
    try:
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            params = reader.restore(folder / "params", args=ocp.args.StandardRestore(target))
        ema = _load_ema(folder, target)
    except Exception as e:
        raise _damaged(folder, e) from e
    return params if ema is None else merge(ema, params)


def _load_ema(folder: Path, target: PyTree) -> PyTree | None:
    if not (folder / "training").is_dir():  # imported, or exported for others to start from
        return None
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder / "training").item_metadata.tree.get("ema")
        if not saved:
            return None
        by_path, names = flatten(target), flatten(saved)
        item = {"ema": unflatten({p: by_path[p] for p in names})}
        args = ocp.checkpoint_utils.construct_restore_args(item)
        return reader.restore(
            folder / "training",
            args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
        )["ema"]
