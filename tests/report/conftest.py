"""The pictures of these tests are small: drawing them takes most of the time."""

import pytest

from instruct_trl.report import pictures


@pytest.fixture(scope="session", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 40)
        yield
