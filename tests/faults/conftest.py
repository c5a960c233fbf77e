"""The matrix of the tiny project, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.harness import Matrix, Tiny


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    made = Matrix(Tiny.make(tmp_path_factory.mktemp("tiny")))
    yield made
    made.close()
