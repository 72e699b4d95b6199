"""What every config dataclass can do: refuse unknown names, freeze, and go to JSON and back.

No postponed annotations in this file: ml_collections reads the types at run time.
"""

import dataclasses
import difflib
import json
from typing import Any

# What every config class is decorated with.
settings = dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)


class Config:
    """Base of all config dataclasses: refuses unknown names, and everything after `freeze`."""

    __slots__ = ("_frozen",)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            raise AttributeError(
                f"the config is frozen; {name!r} has to be set before training starts"
            )
        known = [f.name for f in dataclasses.fields(self)]
        if name not in known:
            raise AttributeError(unknown_key(type(self).__name__, name, known))
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def unknown_key(where: str, name: str, known: list[str]) -> str:
    """The message for a key that nobody declared: it names the nearest one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{where} has no key {name!r}; {hint}"


def get(config: Config, path: str) -> Any:
    """The value at a dotted path, such as "model.d_model"."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def freeze(config: Config) -> Config:
    """Makes the whole tree immutable and hashable, in place; returns it."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Config):
            freeze(value)
        elif isinstance(value, list):
            object.__setattr__(config, f.name, tuple(value))
    object.__setattr__(config, "_frozen", True)
    return config


def thaw(config: Config) -> Config:
    """A mutable deep copy."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return type(config)(**{n: thaw(v) if isinstance(v, Config) else v for n, v in values.items()})


def to_dict(config: Config) -> dict:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict, where: str = "config") -> Any:
    """The inverse of `to_dict`; unknown keys are errors that name the nearest one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kwargs = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(unknown_key(where, name, list(fields)))
        kind = fields[name].type
        if isinstance(kind, type) and issubclass(kind, Config):
            value = from_dict(kind, value, f"{where}.{name}")
        elif inner := fields[name].metadata.get("of"):
            value = tuple(from_dict(inner, v, f"{where}.{name}") for v in value)
        elif isinstance(value, list):
            value = _tuples(value)
        kwargs[name] = value
    return cls(**kwargs)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def save(config: Config, path: str) -> None:
    """Writes the config as JSON."""
    with open(path, "w") as f:
        json.dump(to_dict(config), f, indent=2)
        f.write("\n")


def load(cls: type, path: str) -> Any:
    """Reads what `save` wrote."""
    with open(path) as f:
        return from_dict(cls, json.load(f), where=path)


def override(config: Config, values: dict[str, Any]) -> Config:
    """Sets dotted paths in place, as flags do: `{"model.d_model": 512}`; returns the config."""
    for path, value in values.items():
        *parents, name = path.split(".")
        holder = config
        for parent in parents:
            if not hasattr(holder, parent):
                raise ValueError(
                    unknown_key(path, parent, [f.name for f in dataclasses.fields(holder)])
                )
            holder = getattr(holder, parent)
        try:
            setattr(holder, name, value)
        except AttributeError as e:
            raise ValueError(str(e)) from None
    return config
