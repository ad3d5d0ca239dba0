"""The import arrows of the README: train -> phases -> parts -> {chat, batch}."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("models", "losses", "optim", "distributed", "hub", "rl", "agents")
FORBIDDEN = {  # folder -> packages it may not import
    "src/moonlit": {"data_modules", "callbacks", "hydra", "omegaconf"},
    "src/moonlit/models": {"lightning", "moonlit.phases", "moonlit.losses", "moonlit.optim"},
    "src/moonlit/losses": {"lightning", "moonlit.phases", "moonlit.models", "moonlit.optim"},
    "src/moonlit/optim": {"lightning", "moonlit.phases", "moonlit.models", "moonlit.losses"},
    "src/moonlit/chat": {"lightning", *(f"moonlit.{part}" for part in (*PARTS, "phases"))},
    "src/moonlit/agents": {"lightning", "moonlit.rl", "moonlit.phases", "moonlit.losses"},
    "src/moonlit/rl": {"lightning", "moonlit.phases", "moonlit.optim"},
    "src/moonlit/hub": {"lightning", "moonlit.phases", "moonlit.losses", "moonlit.optim"},
    "src/moonlit/phases": {"moonlit.train", "moonlit.cli"},
    "data_modules": {"callbacks", "moonlit.models", "moonlit.phases", "hydra", "omegaconf"},
    "callbacks": {"data_modules", "moonlit.models", "moonlit.phases", "hydra", "omegaconf"},
}
COMPOSITION_ROOTS = {
    ROOT / f"src/moonlit/{name}.py"
    for name in ("train", "submit", "cli", "parts", "refusal", "help")
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(("folder", "banned"), FORBIDDEN.items())
def test_imports_point_down(folder: str, banned: set[str]):
    for path in (ROOT / folder).rglob("*.py"):
        if path in COMPOSITION_ROOTS:
            continue
        bad = {n for n in imported(path) for b in banned if n == b or n.startswith(b + ".")}
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_the_batch_knows_no_other_part():
    names = imported(ROOT / "src/moonlit/batch.py")
    assert not {n for n in names if n.startswith("moonlit")}


def test_callbacks_do_not_know_each_other():
    for path in (ROOT / "callbacks").glob("*.py"):
        assert not {n for n in imported(path) if n.startswith("callbacks")}, path.name


def test_consoles_print_words_as_they_are():
    """Catches: `data.held_out=[web]` in the command that goes on, taken for a style and lost."""
    for folder in ("src", "data_modules", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in (
                n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
            ):
                if isinstance(call.func, ast.Name) and call.func.id == "Console":
                    prints = {keyword.arg for keyword in call.keywords}
                    assert "markup" in prints, f"{path.relative_to(ROOT)}:{call.lineno}"
