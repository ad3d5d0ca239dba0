from collections.abc import Iterator

import pytest

from tests.rl.managers import MADE


@pytest.fixture(autouse=True)
def _close_managers() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()
