"""Recipes: YAML files that say what to train on what, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pt_core import registry
from pt_core.artifacts import CONFIG, Artifact
from pt_core.errors import InputError
from pt_core.method import MethodConfig
from pt_core.plan import FitConfig
from pt_core.settings import Settings

T = TypeVar("T", bound=BaseModel)
# Beside its own errors, those of bytes, dates, numbers of thousands of digits, and brackets of thousands of levels.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


class MethodChoice(BaseModel):
    """A method by its name; all other keys are the method's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


class Variant(BaseModel):
    """What one label of a comparison stands for; all keys but these two are the method's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str | None = Field(None, description="name of the method, where the label is another one")
    training: dict[str, Any] = Field({}, description="changes to the recipe's `training`")


class Recipe(Settings):
    """What every recipe has. A package adds its `backbone` and `data` (`Recipe` of its `workbench` module)."""

    package: ClassVar[str]  # short name of the package whose methods the recipe may name
    # Settings of methods that follow from the rest of the recipe, and where from: two values of one thing could differ.
    told_elsewhere: ClassVar[Mapping[str, str]] = {}

    about: str = Field("", description="what the recipe shows, for `pt list --recipes`")
    method: MethodChoice
    training: FitConfig
    compare: dict[str, Variant | None] = Field(
        {}, description="what `pt compare` sets beside the recipe's method, by label; null leaves a label out"
    )
    seed: int = Field(0, ge=0, description="of the draw of rows, of start values and of the run; the first of several")

    @field_validator("training")
    @classmethod
    def _one_seed(cls, value: FitConfig) -> FitConfig:
        if "seed" in value.model_fields_set:
            raise ValueError("the seed is a key of the recipe, not of its `training`")
        return value

    def labels(self) -> list[str]:
        """What `pt compare` runs by default: the recipe's method, then the labels of its `compare` section.

        Raises:
            InputError: the section has settings for the recipe's own method, which would not be used.
        """
        own = self.method.name
        if self.compare.get(own) is not None:
            raise InputError(
                "these settings would not be used: the label is that of the recipe's own method",
                field=f"compare.{own}",
                remedy=f"Choose another label, with `method: {own}` in it, or set it to null",
            )
        return [own, *(label for label, variant in self.compare.items() if variant is not None)]

    def with_method(self, label: str) -> Self:
        """This recipe with another method: one of the `compare` section, or any method of the package at its defaults.

        Raises:
            InputError: there is no such method, or it does not have these settings.
        """
        if label == self.method.name:
            return self
        section, variant = f"compare.{label}", self.compare.get(label) or Variant()
        settings = variant.model_extra or {}
        if "name" in settings:
            raise InputError("unknown key", field=f"{section}.name", remedy="Name the method by `method`")
        run = self.training.model_dump(exclude_unset=True) | variant.training
        try:
            training = FitConfig.model_validate(run)
            self._one_seed(training)
        except ValidationError as error:
            raise explain(error, FitConfig, f"{section}.training") from error
        except ValueError as error:
            raise InputError(str(error), field=f"{section}.training.seed") from error
        choice = MethodChoice.model_validate({"name": variant.method or label, **settings})
        changed = self.model_copy(update={"method": choice, "training": training})
        changed.config(section)
        return changed

    def config(self, section: str = "method", **known: Any) -> MethodConfig:
        """The checked configuration of the recipe's method.

        Args:
            section: where the settings stand, for messages.
            known: what only the data can tell (classes, seed); used where the method has such a setting and the recipe
                leaves it open.

        Raises:
            InputError: a setting is unknown, has no such value, or follows from the rest of the recipe (`told_elsewhere`).
        """
        settings = self.method.model_extra or {}
        schema = registry.find_method(self.package, self.method.name).config_class
        for name, source in self.told_elsewhere.items():
            if name in settings and name in schema.model_fields:
                raise InputError(source, field=f"{section}.{name}", remedy="Leave it out here")
        fitting = {k: v for k, v in known.items() if k in schema.model_fields}
        try:
            return schema.model_validate(fitting | settings)
        except ValidationError as error:
            raise explain(error, schema, section, hidden=self.told_elsewhere) from error


def find(name: str) -> tuple[str, Path]:
    """The package and file of a recipe: `nlp/bbc-topics`, or the path of a YAML file that names its `package`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError("no such file", file=path, remedy="`pt list --recipes` shows the installed recipes")
        package = _parse(path).get("package")
        if not isinstance(package, str) or package not in registry.packages():
            known = ", ".join(registry.packages()) or "none"
            problem = "is missing" if package is None else f"{package!r} is no installed package"
            raise InputError(problem, file=path, field="package", remedy=f"Installed: {known}")
        return package, path
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


def load(name: str, changes: Mapping[str, Any] | None = None) -> tuple[str, Recipe]:
    """Read and check a recipe.

    Args:
        name: see `find`.
        changes: `key.key` -> value, put in the place of the recipe's own.

    Returns:
        The package's short name and the recipe.

    Raises:
        InputError: naming the recipe, the key and what is allowed there.
    """
    package, path = find(name)
    content = _parse(path)
    content.pop("package", None)
    schema: type[Recipe] = registry.workbench(package).Recipe
    try:
        for key, value in (changes or {}).items():
            _set(content, key, value)
        recipe = schema.model_validate(content)
        recipe.config()
        for label, variant in recipe.compare.items():
            if variant is not None:
                recipe.with_method(label)
    except ValidationError as error:
        raise explain(error, schema, file=name) from error
    except InputError as error:
        raise InputError(str(error), file=name) from error
    return package, recipe


def parse_settings(lines: Sequence[str]) -> dict[str, Any]:
    """`key.key=value` lines, the values in YAML, as changes to a recipe.

    Raises:
        InputError: a line has no key or no value that can be read.
    """
    changes = {}
    for line in lines:
        key, sign, value = line.partition("=")
        if not sign or not all(key.split(".")):
            raise InputError(f"{line!r} is no setting", remedy="Write --set key.key=value")
        try:
            changes[key] = yaml.safe_load(value)
        except NOT_YAML as error:
            raise InputError(
                f"the value is not YAML: {value!r}", field=key, remedy="Quote text: 'key=\"text\"'"
            ) from error
    return changes


def opened(
    artifact: Artifact, schema: type[T], backbone: str | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[T, str]:
    """The task of a saved prompt, checked, and the name of the backbone to put it on: its own, unless another is named.

    Args:
        schema: of the package's tasks.
        backbone: hub id or folder in place of the artifact's own.
        defaults: values of the task where the artifact has none.

    Raises:
        InputError: the artifact was saved without its task, or does not say where its backbone comes from.
    """
    folder, task = artifact.folder, artifact.config.task
    if task is None:
        raise InputError("holds no task", file=folder, remedy="Save it with task=task.spec.model_dump()")
    name = backbone or artifact.config.backbone.name
    if name is None:
        raise InputError("does not say where its backbone comes from", file=folder, remedy="Name it: --backbone")
    try:
        return schema.model_validate({**(defaults or {}), **task}), name
    except ValidationError as error:
        raise explain(error, schema, "task", folder) from error


def check_head(artifact: Artifact, labels: int, outputs: int | None) -> None:
    """Refuse a saved prompt whose task has more or fewer labels than it has outputs (None: it has none of its own).

    Raises:
        InputError: naming the file.
    """
    if outputs is not None and outputs != labels:
        raise InputError(
            f"the task has {labels} labels, the prompt answers for {outputs}",
            file=artifact.folder / CONFIG,
            field="task",
            remedy="Get the file again",
        )


def explain(
    error: ValidationError,
    model: type[BaseModel],
    section: str = "",
    file: str | Path | None = None,
    hidden: Collection[str] = (),
) -> InputError:
    """What pydantic found first, as one line: the key, what is wrong, and what is allowed.

    Args:
        error: of the validation of `model`.
        section: key under which the model's own keys stand.
        file: where they were read.
        hidden: keys of the model that are not allowed there.
    """
    unknown = ("extra_forbidden", "invalid_key")  # shown before others: a misspelt key explains a missing one
    first = min(error.errors(), key=lambda found: found["type"] not in unknown)
    key = ".".join(filter(None, [section, *(str(part) for part in first["loc"])])) or None
    key = key.removesuffix(".[key]") if key is not None else None  # the key itself is wrong, not its value
    problem, remedy, given = first["msg"].removeprefix("Value error, "), "", first["input"]
    if first["type"] == "missing":
        problem = "is missing"
    elif first["type"] == "extra_forbidden":
        allowed = [key for key in _keys(model, first["loc"][:-1]) if key not in hidden]
        like = get_close_matches(str(first["loc"][-1]), allowed, 1)
        problem = f"unknown key (did you mean {like[0]!r}?)" if like else "unknown key"
        remedy = f"Allowed there: {', '.join(allowed)}" if allowed else ""
    elif given is None or isinstance(given, str | int | float):
        problem += f" (got {given!r})"
        if first["type"] == "string_type" and isinstance(given, bool):
            remedy = "Quote it: YAML reads yes, no, on, off, true and false as booleans"
        elif first["type"] == "string_type" and given is not None:
            remedy = f"Quote it: '{given}'"
    return InputError(problem, file=file, field=key, remedy=remedy)


def _keys(model: Any, location: Sequence[int | str]) -> list[str]:
    """Keys of the model that stands at a location inside of another one."""
    for part in location:
        field = model.model_fields.get(part)
        model = field.annotation if field is not None else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return sorted(model.model_fields)


class _Loader(yaml.SafeLoader):
    """YAML of which no key may be there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise InputError("the key is there twice", row=line, field=key.value, remedy="Leave one")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except InputError as error:
        raise InputError(str(error), file=path) from error
    except NOT_YAML as error:
        raise InputError(f"is not YAML: {' '.join(str(error).split())}", file=path) from error
    if not isinstance(content, dict):
        raise InputError("holds no settings", file=path, remedy="A recipe is a mapping of keys")
    return content


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InputError(f"{section!r} is a value, not a section", field=key)
    content[last] = value
