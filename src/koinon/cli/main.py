"""The command line: `koinon --help` lists what it can do.

Every command imports what it needs when it is called, so help and usage errors come at once and no command loads torch
into this process. An error of the error tree is one sentence on stderr and exit status 1; wrong usage is status 2;
Ctrl-C is 130. Knows nothing of how commands do their work.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from koinon.errors import NO_ROOM, KoinonError, UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="koinon",
    help="Trains, owns and serves a neural network that no single actor holds whole.",
    epilog="Begin with: koinon demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half the time of --help: 0.09 s of CPU instead of 0.2 s
    context_settings={"help_option_names": ["-h", "--help"]},
)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print("koinon", version("koinon"))
        raise typer.Exit


@app.callback()
def koinon(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False,
) -> None:
    """Trains, owns and serves a neural network that no single actor holds whole."""


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the run shall lie.")] = Path(
        "runs/demo"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh/--keep", help="Remove a run that lies there, or take the next free name.")
    ] = False,
    picture: Annotated[Optional[Path], typer.Option(hidden=True, help="Save the live view as SVG.")] = None,  # noqa: UP045
) -> None:
    """Watch a small league train, lose a worker, and not care."""
    import asyncio

    from koinon.cli.demo import run_demo
    from koinon.run.spec import RunSpec

    asyncio.run(run_demo(RunSpec.recipe("demo"), directory, _console(), fresh=fresh, picture=picture))


class RunCommand(TyperCommand):
    """Its help lists every key of a spec, which is more than the help of other commands needs to load."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from koinon.cli.recipes import defaults

        with formatter.section("The keys of a spec, with their defaults"):
            formatter.write("".join(f"  {line}\n" for line in defaults()))


@app.command("run", cls=RunCommand)
def run_(
    source: Annotated[
        Optional[str],  # noqa: UP045 - typer reads these at run time
        typer.Argument(metavar="SPEC", help="A TOML file or the name of a recipe; with --resume, a directory."),
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Worker processes in all: N / stages of each stage."),
    ] = None,
    directory: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--dir", metavar="DIR", help="Where the run lies or shall lie; runs/NAME by default."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key of the spec, say train.steps=100."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="UDP port of the control process; 0: any free one.")] = 0,
) -> None:
    """Train a model with a league on this machine, or go on with one."""
    import asyncio

    from koinon.cli.sources import new_run, resumed_run
    from koinon.cli.training import train

    if resume:
        order = resumed_run(source, directory, overrides or (), workers)
    elif source is not None:
        order = new_run(source, directory, overrides or (), workers)
    else:
        raise UserError("What shall be trained? Name a spec file or a recipe; `koinon recipes` lists those.")
    asyncio.run(train(order, _console(), port))


Bind = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen (UDP, IPv4); port 0: any free one.")]
Advertise = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="HOST:PORT", help="Where others reach it, if elsewhere: behind a router. May be repeated."),
]
Threads = Annotated[int, typer.Option(min=1, metavar="N", help="Threads to compute with.")]
InvitationText = typer.Argument(
    metavar="INVITATION", help="The line that begins with koinon1, or a file that holds it."
)


@app.command()
def coordinate(
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="SPEC", help="A TOML file or the name of a recipe; with --resume, a directory."),
    ] = None,
    directory: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--dir", metavar="DIR", help="Where the run lies or shall lie; runs/NAME by default."),
    ] = None,
    bind: Bind = "0.0.0.0:4774",
    advertise: Advertise = None,
    local_workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Workers on this machine; the other seats are for joiners.")
    ] = 0,
    days: Annotated[float, typer.Option(min=0.001, metavar="N", help="How long invitations are good.")] = 30.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key of the spec, say train.steps=100."),
    ] = None,
) -> None:
    """Lead a league of workers from anywhere, and print the invitation that brings them."""
    import asyncio

    from koinon.cli.coordinate import Hosting
    from koinon.cli.coordinate import coordinate as lead
    from koinon.cli.sources import new_run, resumed_run

    if resume:
        order = resumed_run(source, directory, overrides or (), None)
    elif source is not None:
        order = new_run(source, directory, overrides or (), None)
    else:
        raise UserError("What shall be trained? Name a spec file or a recipe; `koinon recipes` lists those.")
    asyncio.run(lead(order, Hosting(bind, tuple(advertise or ()), local_workers, days), _console()))


@app.command()
def join(
    invitation: Annotated[str, InvitationText],
    directory: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--dir", metavar="DIR", help="Where this machine keeps its seat; joined/RUN by default."),
    ] = None,
    account: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Who is credited. All machines of an account serve one stage."),
    ] = None,
    bind: Bind = "0.0.0.0:0",
    advertise: Advertise = None,
    threads: Threads = 1,
    rehearse: Annotated[Optional[int], typer.Option(hidden=True, help="Found this stage from the spec's seed.")] = None,  # noqa: UP045
) -> None:
    """Serve a run with this machine: check everything, take a seat, work until it is complete or Ctrl-C."""
    import asyncio

    from koinon.cli.doctor import text_of
    from koinon.cli.join import Wish, join_run

    wish = Wish(text_of(invitation), directory, account, bind, tuple(advertise or ()), threads, rehearse)
    asyncio.run(join_run(wish, _console()))


@app.command()
def leave(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --dir of a `koinon join` that is at work.")],
) -> None:
    """Let the worker that joined from a directory say goodbye and end."""
    from koinon.cli.join import leave_run

    leave_run(directory, _console())


@app.command()
def doctor(
    invitation: Annotated[Optional[str], InvitationText] = None,  # noqa: UP045
    bind: Bind = "0.0.0.0:0",
    advertise: Advertise = None,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Try the way into a run hop by hop, and say what to do about the first that fails."""
    import asyncio

    from koinon.cli.doctor import examine, text_of, way_of
    from koinon.net.identity import NodeKey

    way = way_of(NodeKey.generate(), Path(), bind, tuple(advertise or ()), threads)
    text = None if invitation is None else text_of(invitation)
    if not asyncio.run(examine(text, way, _console(), as_json=as_json)):
        raise typer.Exit(1)


@app.command()
def status(directory: Directory, as_json: AsJson = False) -> None:
    """Say how a run stands, while it runs and afterwards."""
    from koinon.cli.status import show_status

    show_status(directory, _console(), as_json=as_json)


@app.command()
def log(
    directory: Directory,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print everything that happened in a run, one line per event."""
    from koinon.cli.journal import show_log

    show_log(directory, _console(), follow=follow, as_json=as_json)


@app.command()
def sample(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How many tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Equal seeds give equal texts.")] = 0,
) -> None:
    """Continue a text with a trained model, each token through all stages."""
    import asyncio

    from koinon.cli.sampling import Sampling, sample_run

    asyncio.run(sample_run(directory, prompt, Sampling(tokens, temperature, seed), _console()))


@app.command()
def standby(
    directory: Directory,
    own: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--dir", metavar="OWN", help="Where this standby keeps its copy; below DIR by default."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="UDP port to be reached at; 0: any free one.")] = 0,
) -> None:
    """Keep a copy of a run's log, and coordinate the run when its coordinator is gone."""
    import asyncio

    from koinon.cli.standby import stand_by

    asyncio.run(stand_by(directory, own, f"127.0.0.1:{port}", _console()))


@app.command()
def recipes() -> None:
    """List the specs that come with koinon."""
    from koinon.cli.recipes import show_recipes

    show_recipes(_console())


def _console() -> Console:
    from koinon.cli.lines import Lines

    return Lines()


def run() -> None:
    """Entry point. The edge of the process: what went wrong becomes one sentence and a status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal of few characters shows question marks, not an error
            stream.reconfigure(errors="replace")
    try:
        app()
    except KoinonError as error:
        from koinon.cli.stopping import Stopped

        if isinstance(error, Stopped):
            sys.exit(error.code)
        _fail(str(error))
    except BrokenPipeError:
        from koinon.cli.lines import leave_pipe

        leave_pipe()
    except OSError as error:
        if error.errno in NO_ROOM:
            _fail(f"No room to write {error.filename or 'to the disk'}: free some space, then start again.")
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}.")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(_reported(error))


def _fail(sentence: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}{sentence}{plain}", file=sys.stderr)
    sys.exit(1)


def _reported(error: Exception) -> str:
    """What nobody foresaw: the account of it goes to a file, for whoever mends it."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="koinon-", suffix=".log", delete=False) as account:
        account.writelines(traceback.format_exception(error))
    return f"This is a fault in koinon ({type(error).__name__}: {error}). Please report it with {account.name}."
