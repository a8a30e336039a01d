"""Recipes: YAML files that say what to train on what, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pt_core import registry
from pt_core.errors import InputError
from pt_core.method import MethodConfig
from pt_core.training import FitConfig


class Recipe(BaseModel):
    """What every recipe has. A package adds its `backbone` and `data` (`Recipe` of its `workbench` module)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = Field("", description="what the recipe shows, for `pt list --recipes`")
    method: dict[str, Any] = Field(description="`name`, and the method's own settings")
    training: FitConfig
    compare: dict[str, dict[str, Any] | None] = Field(
        {},
        description="for `pt compare`: label -> settings; `method` names the method where the label is another name, "
        "`training` changes the run; null leaves the label out",
    )
    seed: int = 0

    @field_validator("method")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "name" not in value:
            raise ValueError("the method needs a name")
        return value

    def labels(self) -> list[str]:
        """What `pt compare` runs by default: the recipe's method, then those of its `compare` section."""
        others = [label for label, settings in self.compare.items() if settings is not None]
        return list(dict.fromkeys([str(self.method["name"]), *others]))

    def with_method(self, label: str) -> Recipe:
        """This recipe with another method: one of the `compare` section, or any installed method at its defaults."""
        if label == self.method["name"]:
            return self
        settings = dict(self.compare.get(label) or {})
        training = settings.pop("training", {})
        name = settings.pop("method", label)
        update: dict[str, Any] = {"method": {"name": name, **settings}}
        if training:
            update["training"] = FitConfig.model_validate(self.training.model_dump() | training)
        return self.model_copy(update=update)


def method_config(recipe: Recipe, **overrides: Any) -> MethodConfig:
    """The checked configuration of a recipe's method. `overrides` are what only the data can tell (classes, seed)."""
    settings = {k: v for k, v in recipe.method.items() if k != "name"}
    cls = registry.find_method(recipe.method["name"])
    fitting = {k: v for k, v in overrides.items() if k in cls.config_class.model_fields and k not in settings}
    try:
        return cls.config_class.model_validate(settings | fitting)
    except ValidationError as error:
        raise _explain(error, None, "method") from error


def find(name: str) -> tuple[str, Path]:
    """The package and file of a recipe: `nlp/bbc-prompt-tuning`, or a path to a YAML file that names its `package`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError("no such recipe", file=path, remedy="`pt list --recipes` shows those that are installed")
        package = _parse(path).get("package")
        if package not in registry.packages():
            known = ", ".join(registry.packages())
            raise InputError(
                f"{package!r} is no installed package", file=path, field="package", remedy=f"One of: {known}"
            )
        return str(package), path
    package, _, stem = name.partition("/")
    if package in registry.packages():
        file = registry.package_folder(package) / "recipes" / f"{stem}.yaml"
        if stem and file.is_file():
            return package, file
    known = ", ".join(installed()) or "none"
    raise InputError(f"no recipe {name!r}", remedy=f"Installed: {known}; or give the path of a YAML file")


def installed() -> dict[str, str]:
    """Installed recipes: name -> what they show. Reads the YAML files only."""
    found = {}
    for package in registry.packages():
        for file in sorted((registry.package_folder(package) / "recipes").glob("*.yaml")):
            found[f"{package}/{file.stem}"] = str(_parse(file).get("about", ""))
    return found


def load(name: str, overrides: Sequence[str] = ()) -> tuple[str, Recipe]:
    """Read and check a recipe.

    Args:
        name: see `find`.
        overrides: `key.key=value`, values in YAML.

    Returns:
        The package's short name and the recipe.

    Raises:
        InputError: naming the file, the key and what is allowed there.
    """
    package, path = find(name)
    content = _parse(path)
    content.pop("package", None)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise InputError(f"{override!r} is no setting", remedy="Write --set key.key=value")
        _set(content, key.split("."), yaml.safe_load(value), override)
    schema: type[Recipe] = registry.workbench(package).Recipe
    try:
        recipe = schema.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path) from error
    try:
        for label in recipe.labels():
            method_config(recipe.with_method(label))
    except (InputError, ValidationError) as error:
        raise InputError(str(error) if isinstance(error, InputError) else str(_explain(error)), file=path) from error
    return package, recipe


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"is not YAML: {' '.join(str(error).split())}", file=path) from error
    if not isinstance(content, dict):
        raise InputError("holds no settings", file=path, remedy="A recipe is a mapping of keys")
    return content


def _set(content: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise InputError(f"{override!r}: {key!r} is a value, not a section")
    content[keys[-1]] = value


def _explain(error: ValidationError, file: Path | None = None, section: str = "") -> InputError:
    """The first problem that pydantic found, as one line: the key, what is wrong, and what is allowed."""
    first = error.errors()[0]
    key = ".".join([*([section] if section else []), *(str(part) for part in first["loc"])])
    remedy = ""
    if first["type"] == "extra_forbidden":
        allowed = _fields(error, first["loc"])
        problem, remedy = "unknown key", f"Allowed there: {', '.join(allowed)}" if allowed else ""
    elif first["type"] == "missing":
        problem = "is missing"
    else:
        problem = first["msg"].removeprefix("Value error, ") + f" (got {first['input']!r})"
    return InputError(problem, file=file, field=key or None, remedy=remedy)


def _fields(error: ValidationError, location: Sequence[int | str]) -> list[str]:
    """Names that are allowed where an unknown key was found."""
    model: Any = _model(error.title)
    for part in location[:-1]:
        field = model.model_fields.get(part) if model is not None else None
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return sorted(model.model_fields) if model is not None else []


def _model(title: str) -> type[BaseModel] | None:
    """Pydantic names a model by its title only: look it up among the subclasses that exist."""
    todo: list[type[BaseModel]] = [Recipe, MethodConfig, FitConfig]
    while todo:
        model = todo.pop()
        if model.__name__ == title:
            return model
        todo += model.__subclasses__()
    return None
