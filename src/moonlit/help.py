"""What ``moonlit COMMAND --help`` prints: the command's own file, and its choices, a line each."""

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

LABEL = re.compile(r"#\s*(\w+):\s+(.*)")


def help_text(command: str, conf: Path) -> str:
    """Return what can be said to a command.

    Args:
        command: its name; ``conf/COMMAND.yaml`` explains its keys.
        conf: folder of the configuration.
    """
    path = conf / f"{command}.yaml"
    own = path.read_text().partition("\nhydra:")[0].rstrip()
    parts = [own, ""]
    for group in groups_of(path):
        parts.append(f"{group}=")
        choices = sorted((conf / group).glob("*.yaml"))
        width = max(len(choice.stem) for choice in choices)
        parts += [f"  {choice.stem:{width}}  {what_is(choice)}".rstrip() for choice in choices]
    parts.append(
        f"\nmoonlit {command} --cfg job prints every key with its value; KEY=VALUE sets it."
    )
    return "\n".join(parts)


def groups_of(path: Path) -> list[str]:
    """Return the groups that a configuration is made of, without those it only adjusts."""
    loaded: Any = OmegaConf.load(path)
    entries = [entry for entry in loaded.get("defaults", []) if OmegaConf.is_dict(entry)]
    groups = [str(key) for entry in entries for key in entry]
    return [group for group in groups if not group.startswith("override ")]


def what_is(path: Path) -> str:
    """Return the first line that a file says of what it is."""
    for line in path.read_text().splitlines():
        label = LABEL.match(line)
        if label is not None and label[1] == "What":
            return label[2].strip()
    return ""
