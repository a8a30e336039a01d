"""What all settings that are read from files have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """Settings by name. Unknown keys are refused, and so are true and false where a number is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        known = _types(cls.model_fields[str(info.field_name)].annotation)
        if known & {int, float} and bool not in known and _holds_bool(value):
            raise ValueError("true and false are no value of this setting")  # pydantic would take true for 1
        return value


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of: {int, NoneType} of `tuple[int, ...] | None`."""
    parts = get_args(annotation)
    return set().union(*map(_types, parts)) if parts else {annotation}


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds_bool, value)) if isinstance(value, list | tuple) else isinstance(value, bool)
