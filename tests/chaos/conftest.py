"""What the tests of this folder are held against."""

from __future__ import annotations

import pytest

from koinon.cli.single import losses as losses_of_one_process
from koinon.nodes.rundir import RunDir
from tests.processes import complete, events, losses, spec_of, start_run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a real league to which nothing was done; they are those of one process with the whole model."""
    folder = tmp_path_factory.mktemp("undisturbed")
    complete(start_run(folder, spec_of(1)))
    found = losses(events(folder))
    assert found == pytest.approx(dict(enumerate(losses_of_one_process(RunDir(folder / "here")))), abs=1e-4)
    return found
