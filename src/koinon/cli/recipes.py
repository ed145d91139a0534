"""`koinon recipes`: the specs that come with koinon. Knows nothing of runs."""

from __future__ import annotations

from dataclasses import asdict
from importlib import resources

from rich.console import Console
from rich.text import Text

from koinon.run.spec import RunSpec, recipes


def show_recipes(console: Console) -> None:
    """Name, purpose and size of each."""
    for name in recipes():
        console.print(Text.assemble((name, "bold"), "  ", purpose(name)))
        console.print(Text(f"    {shape(RunSpec.recipe(name))}", "grey62"))
    console.print("\nStart one with: koinon run NAME. Change what you like: --set train.steps=100")


def defaults() -> list[str]:
    """Every key of a spec as a line of TOML; a comment where a key has no default."""
    spec = RunSpec.of()
    lines = spec.to_toml().splitlines()
    for table, values in asdict(spec).items():
        if isinstance(values, dict) and f"[{table}]" in lines:
            missing = [f"# {key}" for key, value in values.items() if value is None]
            place = lines.index(f"[{table}]") + 1
            lines[place:place] = missing
    return [line for line in lines if line]


def purpose(name: str) -> str:
    """The comment that a recipe begins with."""
    first = resources.files("koinon").joinpath("recipes", f"{name}.toml").read_text("utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def shape(spec: RunSpec) -> str:
    """What will run, in one line."""
    model, train = spec.model, spec.train
    return (
        f"size {model.size}, {model.layers} layers in {model.stages} stages, {spec.league.replicas} workers each; "
        f"{train.steps} steps of {spec.step_tokens:,} tokens"
    )
