"""What Hydra finds wrong with the words of a command, in one line a person can act on."""

from difflib import get_close_matches
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError


def said_plainly(error: HydraException) -> str:
    """Name the word that is wrong, and what was probably meant."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        where, what = (f"{group}={name}", f"conf/{group}") if group else (name, "conf")
        return f"{where}: {what} has no such file; {proposal(name, list(error.options or []))}"
    cause: Any = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        prefix, dot, _ = str(cause.full_key).rpartition(".")
        known = [f"{prefix}{dot}{key}" for key in keys_of(cause.parent_node)]
        hint = f"+{cause.full_key}=... adds one"
        return f"{cause.full_key}: no such key; {proposal(cause.full_key, known)} ({hint})"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: want KEY=VALUE ({str(error).splitlines()[0]})"
    return str(error)


def keys_of(node: Any) -> list[str]:
    """Return the keys of a configuration's node; none if it is a value."""
    return [str(key) for key in node if key[0] != "_"] if hasattr(node, "keys") else []


def proposal(said: str, known: list[str]) -> str:
    """Return what was probably meant, or all that there is."""
    close = get_close_matches(said, known, n=3, cutoff=0.7)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(sorted(known))}" if known else "nothing can be set there"
