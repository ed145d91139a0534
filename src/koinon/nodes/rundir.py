"""Where things lie in a run's directory. One place, so that nobody else spells a path.

spec.toml            the run spec, as it was given
run.log              the run log: everything that happened
data/                tokenizer and token shards
control/key          node key of the control process (0600)
terms                the term store, where the run has standbys
standbys/N/          a standby's own directory: key, copy of the log
seats/SS-RR/         one folder per seat: node key, snapshots, text log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from koinon.errors import NotARun


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.toml"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def key(self) -> Path:
        return self.path / "control" / "key"

    def standby(self, number: int) -> RunDir:
        return RunDir(self.path / "standbys" / str(number))

    def seat(self, stage: int, seat: int) -> Path:
        return self.path / "seats" / f"{stage:02d}-{seat:02d}"

    def seats(self) -> dict[tuple[int, int], Path]:
        """Every seat folder that exists, by (stage, seat)."""
        found = {}
        for folder in sorted((self.path / "seats").glob("[0-9][0-9]-[0-9][0-9]")):
            stage, _, seat = folder.name.partition("-")
            found[int(stage), int(seat)] = folder
        return found

    def require(self) -> RunDir:
        """Itself, if a run lies here. Raises NotARun."""
        if not self.log.exists():  # it is written last
            raise NotARun(
                f"There is no run in {self.path}. `koinon run SPEC.toml --dir {self.path}` starts one there; "
                "`koinon demo` shows one."
            )
        return self
