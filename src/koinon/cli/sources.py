"""From the words of a command line to a spec and a directory. Knows nothing of leagues or terminals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from koinon.errors import Contradiction, NotARun, UserError
from koinon.nodes.rundir import RunDir
from koinon.run.spec import RunSpec, recipes

RUNS = Path("runs")
"""Where runs lie that nobody has named a directory for."""


@dataclass(frozen=True, slots=True)
class Order:
    """What `koinon run` was asked to do. `replicas` None: as many as the spec says."""

    spec: RunSpec
    directory: Path
    resume: bool
    replicas: int | None


def new_run(source: str, directory: Path | None, overrides: Sequence[str], workers: int | None) -> Order:
    """A run to be started: `source` is a TOML file or the name of a recipe. Raises SpecError, UserError."""
    path = Path(source)
    if path.is_dir():
        what = "holds a run: add --resume to go on with it" if RunDir(path).log.exists() else "is a directory"
        raise UserError(f"{source} {what}. To start a new run, name a spec file or a recipe.")
    read = RunSpec.load if _is_file(path) or len(path.parts) > 1 else RunSpec.recipe
    spec = read(source, overrides=overrides)
    if workers is not None:
        replicas = replicas_of(spec, workers)
        spec = read(source, overrides=[*overrides, f"league.replicas={replicas}"])
    return Order(spec, directory or RUNS / spec.name, False, None)


def _is_file(path: Path) -> bool:
    """Or was meant as one."""
    return path.is_file() or path.suffix == ".toml"


def resumed_run(source: str | None, directory: Path | None, overrides: Sequence[str], workers: int | None) -> Order:
    """A run to go on with: `source` is its directory, or the spec that it was started from. Raises UserError."""
    if overrides:
        raise Contradiction("The spec of a run cannot change: --set works with new runs, not with --resume.")
    if source is None or not (_is_file(Path(source)) or source in recipes()):
        return _going_on(_one_of(source, directory), workers)
    given = new_run(source, directory, (), None)
    order = _going_on(given.directory, workers)
    if given.spec.run_id != order.spec.run_id:
        raise Contradiction(
            f"{given.directory} holds a run of another spec than {source}. Resume it by its directory alone "
            f"(koinon run --resume {given.directory}), or start a new run in another directory."
        )
    return order


def _one_of(source: str | None, directory: Path | None) -> Path:
    if source is None and directory is None:
        raise UserError("Which run shall go on? Name its directory: koinon run --resume DIR")
    if source is not None and directory is not None and directory.resolve() != Path(source).resolve():
        raise Contradiction(f"{source} and --dir {directory} are two directories: name the one to resume.")
    return directory or Path(source or ".")


def _going_on(directory: Path, workers: int | None) -> Order:
    spec = spec_in(directory)
    return Order(spec, directory, True, None if workers is None else replicas_of(spec, workers))


def spec_in(directory: Path) -> RunSpec:
    """The spec of the run in a directory. Raises NotARun, SpecError."""
    if not directory.exists():
        raise NotARun(f"There is no directory {directory}. `koinon demo` makes a run to look at.")
    return RunSpec.load(RunDir(directory).require().spec)


def replicas_of(spec: RunSpec, workers: int) -> int:
    """Workers per stage. Raises Contradiction if the stages cannot have equally many."""
    stages = spec.model.stages
    if workers < stages or workers % stages:
        fits = max(stages, workers - workers % stages)
        raise Contradiction(
            f"{workers} workers cannot serve {stages} stages equally: set --workers to {fits} or {fits + stages}."
        )
    return workers // stages


def free_directory(wanted: Path) -> Path:
    """`wanted`, or with the first number behind it that nothing exists under."""
    if not wanted.exists():
        return wanted
    return next(path for n in count(2) if not (path := wanted.with_name(f"{wanted.name}-{n}")).exists())
