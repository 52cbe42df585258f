"""The table of commands, and what all of them share: the version, exit codes, and errors as one message each.

Exit codes: 0 done; 1 an error, said on stderr; 2 wrong usage; 3 the removal destroyed the model; 130 interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from unbackdoor.cli.analyze import analyze
from unbackdoor.cli.attack import attack
from unbackdoor.cli.audit import audit
from unbackdoor.cli.bench import bench
from unbackdoor.cli.clean import clean
from unbackdoor.cli.demo import demo
from unbackdoor.cli.evaluate import evaluate
from unbackdoor.cli.inspect import inspect
from unbackdoor.cli.leaderboard import leaderboard
from unbackdoor.cli.listing import listing
from unbackdoor.cli.terminal import Terminal
from unbackdoor.errors import UnbackdoorError

FAILED, INTERRUPTED = 1, 130

COMMANDS: dict[str, Callable[..., None]] = {
    "clean": clean,
    "evaluate": evaluate,
    "inspect": inspect,
    "audit": audit,
    "analyze": analyze,
    "attack": attack,
    "bench": bench,
    "leaderboard": leaderboard,
    "list": listing,
    "demo": demo,
}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with its errors and an interruption said in one message and told by the exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UnbackdoorError as error:
            Terminal().error(str(error))
            raise typer.Exit(FAILED) from None
        except BrokenPipeError:
            raise  # the reader of our output has gone: click ends quietly
        except OSError as error:
            Terminal().error(str(error))
            raise typer.Exit(FAILED) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
                raise
            Terminal().error(f"the device's memory is full; a smaller network or batch, or --device cpu: {error}")
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            Terminal().error("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None

    return run


def _show_version(wanted: bool) -> None:
    if wanted:
        from unbackdoor import __version__

        typer.echo(f"unbackdoor {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="unbackdoor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Remove backdoors from neural networks with a few clean samples.

    Start with [bold]unbackdoor demo[/bold], or clean a network of your own:
    [bold]unbackdoor clean model.pt --samples clean_images/[/bold]
    """


def _help(command: Callable[..., None]) -> str:
    """The docstring, each paragraph on one line for typer to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


for _name, _command in COMMANDS.items():
    app.command(_name, help=_help(_command))(guarded(_command))
