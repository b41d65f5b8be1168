"""The config file: read strictly, override by dotted key, check whole, write resolved, compare.

    config = load_config("configs/demo.yaml", ["train.batch_size=2048"])

Nothing but the file itself is touched here: no device, no other file. All mistakes are reported
together, each with its line and key path.

Each reader comes in two: one that gives a run's `Config`, and one for any class that extends it
(`root`), for the command reads more sections from the same files.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_origin

import pydantic

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import (
    AnyPath,
    StoragePath,
    make_folder,
    storage_path,
    write_text,
)
from sae_train.config import errors, schema, strict_yaml
from sae_train.config.places import moved_places
from sae_train.config.run import Config
from sae_train.recipe import fill

FILE_NAME = "config.yaml"

Root = TypeVar("Root", bound=Config)


def load_config(path: AnyPath, overrides: Sequence[str] = ()) -> Config:
    """`load_config_as` for the config of a run."""
    return load_config_as(Config, path, overrides)


def load_config_as(
    root: type[Root],
    path: AnyPath,
    overrides: Sequence[str] = (),
    *,
    folder: StoragePath | None = None,
) -> Root:
    """Read a config file, apply `key=value` overrides from left to right, check it whole.

    Args:
        root: the class of the whole file.
        path: the YAML file.
        overrides: `train.batch_size=2048`; the value is YAML in flow style, the key may name a
            whole section, an entry of a list (`cache.sites.0.layers`) or a sweep's list
            (`sweep.grid.sae.width`).
        folder: the output folder that the file lies in, if it is a resolved one: paths that have
            moved with it are set to where they lead now (`config.places`).

    Raises:
        UserError: naming the file, the line, the key's path and the rule, for every mistake.
    """
    document = strict_yaml.parse(_read_text(path), name=str(path))
    if not isinstance(document.value, dict):
        found = "empty" if document.value is None else errors.shown(document.value)
        raise UserError(f"{path}: a config is a mapping of sections; this file is {found}")
    origins: dict[strict_yaml.Path, str] = {
        key: f"line {line}" for key, line in document.lines.items()
    }
    values = document.value
    if folder is not None:
        for key, place in moved_places(values, folder).items():
            _set(values, _key_path(key, root=root, source=key), place, source=key)
    before, keys = copy.deepcopy(values), [one.partition("=")[0] for one in overrides]
    for override in overrides:
        key_path = _apply_override(values, override, root=root)
        origins = {
            key: origin for key, origin in origins.items() if key[: len(key_path)] != key_path
        }
        origins[key_path] = f"override {override}"
    fill.forget(values, keys=keys, before=before)
    if folder is not None:
        _refuse_late_recipe(values, before=before, source=str(path))
    return _validate(root, values, name=str(path), origins=origins)


def with_values(config: Root, values: Mapping[str, Any], *, source: str) -> Root:
    """The config with dotted keys set to plain values, checked whole again; of the same class.

    Raises:
        UserError: an unknown key or a value the checks refuse; `source` says where from.
    """
    root, before = type(config), config.model_dump(mode="python")
    data = copy.deepcopy(before)
    for key, value in values.items():
        _set(data, _key_path(key, root=root, source=source), copy.deepcopy(value), source=source)
    fill.forget(data, keys=values, before=before)
    _refuse_late_recipe(data, before=before, source=source)
    return _validate(root, data, name=source, origins={})


def _refuse_late_recipe(
    values: Mapping[str, Any], *, before: Mapping[str, Any], source: str
) -> None:
    """A recipe fills keys that aren't given, and in a resolved config all are.

    But for sections that were set as a whole.
    """
    name = fill.value_at(values, fill.RECIPE, None)
    late = name is not None and fill.value_at(before, fill.RECIPE, None) is None
    if late and not fill.value_at(fill.filled(values), fill.CHOSE, None):
        raise UserError(
            f"{source}: train.recipe {name} would fill nothing, for in a resolved config every key "
            "has a value. Write a recipe into the config file itself; `train.recipe: gemma_scope` "
            "has the numbers of none"
        )


def resolved_yaml(config: Config) -> str:
    """The config with every default written out; `load_config_as` reads back an equal one."""
    return strict_yaml.dump(config.model_dump(mode="python"))


def write_config(config: Config, folder: AnyPath) -> None:
    """Write the resolved config as `<folder>/config.yaml`, atomically."""
    write_text(make_folder(folder) / FILE_NAME, resolved_yaml(config))


def read_run_config(folder: AnyPath, overrides: Sequence[str] = ()) -> Config:
    """`read_run_config_as` for the config of a run."""
    return read_run_config_as(Config, folder, overrides)


def read_run_config_as(root: type[Root], folder: AnyPath, overrides: Sequence[str] = ()) -> Root:
    """The resolved config of an output folder, with the places where folder and store are now.

    Raises:
        UserError: it isn't an output folder, or its config is damaged.
    """
    path = storage_path(folder) / FILE_NAME
    if not path.is_file():
        what = "has no config.yaml" if storage_path(folder).is_dir() else "does not exist"
        raise UserError(
            f"{folder} {what}: it is not the output folder of a run or a sweep. Give the folder "
            "that `output:` names, or the config file itself."
        )
    return load_config_as(root, path, overrides, folder=storage_path(folder))


def differing_fields(a: Config, b: Config) -> list[str]:
    """Dotted keys of a run's config whose values differ, in the schema's order.

    A list is compared whole. What a class that extends `Config` adds is not compared.
    """
    left, right = (
        _flatten(one.model_dump(mode="python", include=set(Config.model_fields))) for one in (a, b)
    )
    missing = object()
    return [key for key in left | right if left.get(key, missing) != right.get(key, missing)]


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key; None where the config has no such key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part) if part in getattr(type(value), "model_fields", ()) else None
    return value


def _read_text(path: AnyPath) -> str:
    try:
        return storage_path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file{_meant(path)}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; a config file was expected") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): not a config") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _meant(path: AnyPath) -> str:
    """A hint at a file in the same folder whose name is nearly the missing one's."""
    wanted = storage_path(path)
    try:
        names = [file.name for file in wanted.parent.iterdir()]
    except OSError:
        return " or output folder"
    near = difflib.get_close_matches(wanted.name, names, n=1, cutoff=0.8)
    return f"; did you mean {wanted.parent / near[0]}?" if near else " or output folder"


def _validate(
    root: type[Root],
    values: dict[str, Any],
    *,
    name: str,
    origins: Mapping[strict_yaml.Path, str],
) -> Root:
    try:
        return root.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [
            ": ".join(part for part in (_where(path, origins), message) if part)
            for path, message in errors.mistakes(error, root=root)
        ]
    if len(lines) == 1:
        raise UserError(f"{name}, {lines[0]}")
    raise UserError(f"{name} has {len(lines)} mistakes:\n  " + "\n  ".join(lines))


def _where(path: strict_yaml.Path, origins: Mapping[strict_yaml.Path, str]) -> str:
    """'line 12, train.tokens'; the nearest enclosing key with an origin lends it."""
    origin = next(
        (origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), None
    )
    if origin and path in origins and origin.startswith("override"):
        return origin
    return ", ".join(part for part in (origin, strict_yaml.dotted(path)) if part)


def _apply_override(
    values: dict[str, Any], override: str, *, root: type[Config]
) -> strict_yaml.Path:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': write it as key=value, e.g. train.batch_size=2048")
    path = _key_path(key, root=root, source=f"override '{override}'")
    value = strict_yaml.parse(text, name=f"override '{override}'").value
    _set(values, path, value, source=f"override '{override}'")
    return path


def _key_path(key: str, *, root: type[Config], source: str) -> strict_yaml.Path:
    path = _checked_path(key, root)
    if path is None:
        raise UserError(f"{source}: {_unknown(key, root=root)}")
    return path


@functools.lru_cache(maxsize=1024)  # a suite sets the same keys in a thousand configs
def _checked_path(key: str, root: type[Config]) -> strict_yaml.Path | None:
    """Split a dotted key, checking every part against the schema; None if one is unknown."""
    path: strict_yaml.Path = ()
    annotations: list[Any] = [root]
    parts = key.split(".")
    while parts:
        inner = [one for annotation in annotations for one in schema.alternatives(annotation)]
        if any(get_origin(one) is dict for one in inner):
            return (*path, ".".join(parts))  # below sweep.grid the rest is one key
        part: str | int = parts.pop(0)
        in_list = isinstance(part, str) and part.isdecimal()
        step: str | int = int(part) if in_list else part
        annotations = [one for each in annotations for one in schema.child(each, step)]
        if not annotations:
            return None
        path = (*path, step)
    return path


def _unknown(key: str, *, root: type[Config]) -> str:
    valid = list(schema.dotted_keys(root))
    same_end = [name for name in valid if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_end[0] if len(same_end) == 1 else schema.nearest(key, valid)
    hint = f"; did you mean '{near}'?" if near else ""
    return f"unknown key '{key}'{hint}"


def _set(values: dict[str, Any], path: strict_yaml.Path, value: Any, *, source: str) -> None:
    """Set a value deep inside plain data, making the sections on the way."""
    holder: Any = values
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(part, int):
            if not isinstance(holder, list) or part >= len(holder):
                length = len(holder) if isinstance(holder, list) else 0
                raise UserError(f"{source}: there is no entry {part} to set; the list has {length}")
        elif not isinstance(holder, dict):
            raise UserError(
                f"{source}: {strict_yaml.dotted(path[:depth])} is "
                f"{errors.shown(holder)}, not a section"
            )
        if last:
            holder[part] = value
        elif isinstance(part, str):
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        else:
            holder = holder[part]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else key))
    return flat
