"""Does a JSON value fit a JSON schema? The part of the language that tool declarations use."""

from collections.abc import Callable
from typing import Any

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: type(value) is int or (type(value) is float and value.is_integer()),
    "number": lambda value: type(value) in (int, float),
    "any": lambda value: True,
}


def mismatch(value: Any, schema: dict[str, Any], name: str = "arguments") -> str | None:
    """Say where a value first departs from a schema; None: it fits.

    Knows ``type`` (one or several), ``enum``, ``required``, ``properties``,
    ``additionalProperties: false``, ``items``, lengths, item counts and bounds.
    """
    kinds = schema.get("type", "any")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(TYPES[kind](value) for kind in kinds):
        return f"{name} is {shown(value)}: want {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{name} is {shown(value)}: want one of {schema['enum']}"
    if isinstance(value, dict):
        return object_mismatch(value, schema, name)
    if isinstance(value, list):
        found = (
            mismatch(item, schema.get("items", {}), f"{name}[{place}]")
            for place, item in enumerate(value)
        )
        return out_of_bounds(len(value), schema, name, "Items") or next(filter(None, found), None)
    if isinstance(value, str):
        return out_of_bounds(len(value), schema, name, "Length")
    if type(value) in (int, float):
        return out_of_bounds(value, schema, name, "imum")
    return None


def object_mismatch(value: dict[str, Any], schema: dict[str, Any], name: str) -> str | None:
    """Compare an object's keys and values."""
    properties = schema.get("properties", {})
    if missing := [key for key in schema.get("required", ()) if key not in value]:
        return f"{name} lacks {', '.join(missing)}"
    if schema.get("additionalProperties") is False:
        unknown = [key[:100] for key in value if key not in properties]
        if unknown:
            return f"{name} has {unknown[0]!r}: want {', '.join(properties) or 'nothing'}"
    found = (
        mismatch(value[key], properties[key], f"{name}.{key}") for key in value if key in properties
    )
    return next(filter(None, found), None)


def out_of_bounds(size: int | float, schema: dict[str, Any], name: str, suffix: str) -> str | None:
    """Compare a number, a length or a count with ``min...`` and ``max...``."""
    if size < schema.get(f"min{suffix}", size):
        return f"{name}: {size} is below min{suffix}={schema[f'min{suffix}']}"
    if size > schema.get(f"max{suffix}", size):
        return f"{name}: {size} is above max{suffix}={schema[f'max{suffix}']}"
    return None


def shown(value: Any) -> str:
    """Show a value, cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
