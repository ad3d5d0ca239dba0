"""The process that compares mathematical expressions: one request a line, one reply a line.

math-verify and SymPy may run for ever, eat all memory, or crash on what a policy writes: here that
costs a process, which ``mathematics.py`` kills and starts anew. Expressions are read by the LaTeX
grammar only: the plain-text reader evaluates Python.

Run as ``python -I -m moonlit.rl.rewards.math_worker BYTES`` (of address space).
"""

import json
import logging
import re
import resource
import sys
from typing import Any

RIGHT, WRONG, UNREADABLE, BAD_TRUTH = "right", "wrong", "unreadable", "bad truth"
VARIABLE = re.compile(r"\s*\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?\s*")


def verdict(answer: str, truth: str) -> str:
    """Compare two expressions in LaTeX."""
    from math_verify import verify

    wanted, said = read(truth), read(answer)
    if wanted is None:
        return BAD_TRUTH
    if said is None:
        return UNREADABLE
    if "=" not in truth and not names_its_value(answer):
        return WRONG
    if is_number(wanted) and not is_literal(value_of(said)):
        return WRONG
    return RIGHT if verify([wanted], [said], timeout_seconds=None) else WRONG


def read(expression: str) -> Any:
    """Return what SymPy makes of an expression; None if nothing."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        f"${expression}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]  # off: SIGALRM is not ours
    )
    return found[0] if found else None


def names_its_value(answer: str) -> bool:
    """Whether an answer has no equation, or one that gives a variable its value.

    Of a chain such as ``2 = 1`` math-verify would believe the last link.
    """
    left, *rest = answer.split("=")
    return not rest or (len(rest) == 1 and VARIABLE.fullmatch(left) is not None)


def value_of(said: Any) -> Any:
    """Return the right side of an equation, and the one element of a set."""
    return getattr(said, "rhs", said)


def is_number(expression: Any) -> bool:
    """Whether a truth is an integer, a decimal number or a fraction."""
    return bool(getattr(expression, "is_rational", False) or getattr(expression, "is_Float", False))


def is_literal(expression: Any) -> bool:
    """Whether an expression is a number as people write it, not a calculation that has its value.

    Else the question's own words, ``37 * 41``, would be its answer.
    """
    numerators = denominators = 0
    for factor in factors(expression):
        base, exponent = factor.as_base_exp() if factor.is_Pow else (None, None)
        if exponent == -1 and getattr(base, "is_Integer", False):
            denominators += 1
        elif base == 10 and getattr(exponent, "is_Integer", False):
            continue
        elif not factor.is_Number:
            return False
        elif factor not in (1, -1):
            numerators += 1
    return numerators <= 1 and denominators <= 1


def factors(expression: Any) -> list[Any]:
    """Return the factors of a product, of products inside it too."""
    if not getattr(expression, "is_Mul", False):
        return [expression if hasattr(expression, "is_Pow") else NotANumber()]
    return [one for factor in expression.args for one in factors(factor)]


class NotANumber:
    """Stands for what SymPy does not know as an expression."""

    is_Pow = is_Number = False  # SymPy's names


def serve(memory_bytes: int) -> None:
    """Answer requests until the other side closes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"verdict": verdict(request["answer"], request["truth"])}
        except Exception as error:  # told to the other side, which knows whose fault it is
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        sys.stdout.write(json.dumps({"id": request["id"], **reply}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
