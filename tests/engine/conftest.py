"""What several tests of the engine use."""

from pathlib import Path

import pytest

from tests.decoder.models import make, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of one of the tiny models, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = save(make(name), tmp_path_factory.mktemp("model"))
        return made[name]

    return of
