"""Entry point of the command line: finds the command and turns errors into one line and an exit status."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

from spkfast import cli
from spkfast.errors import InputError, nearest

_NOT_COMMANDS = ("common", "main")


def main(argv: list[str] | None = None) -> int:
    """Runs ``spkfast ARGV`` and returns its exit status: 0, or 2 for wrong usage or bad input."""
    argv = sys.argv[1:] if argv is None else argv
    # Read when torch is imported. Threads that wait spinning slow each other down many times over where other work
    # shares the cores, and gain little where none does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    name = "spkfast"
    try:
        if not argv:
            raise InputError(f"name a command: {', '.join(_commands())}; 'spkfast --help' tells what they do")
        if argv[0] in ("-h", "--help"):
            print(_help())
        elif argv[0] == "--version":
            from spkfast import __version__

            print(f"spkfast {__version__}")
        elif argv[0] not in _commands():
            kind = "option" if argv[0].startswith("-") else "command"
            known = ["--help", "--version"] if kind == "option" else _commands()
            raise InputError(f"unknown {kind} {argv[0]!r}{nearest(argv[0], known)}; see 'spkfast --help'")
        else:
            name = f"spkfast {argv[0]}"
            status = importlib.import_module(f"spkfast.cli.{argv[0]}").main(argv[1:])
            sys.stdout.flush()
            return status or 0
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:  # the reader of standard output has left; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except MemoryError:
        return _fail(name, "out of memory: ask for less at a time")
    except InputError as error:
        return _fail(name, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "spkfast":
            raise
        return _fail(name, f"needs the package {error.name!r}: pip install 'spkfast[all]'")
    except OSError as error:
        return _fail(name, ": ".join(str(part) for part in (error.filename, error.strerror or error) if part))


def _fail(name: str, message: str, status: int = 2) -> int:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _commands() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(cli.__path__) if module.name not in _NOT_COMMANDS]


def _help() -> str:
    commands = {name: importlib.import_module(f"spkfast.cli.{name}").HELP for name in _commands()}
    width = max(len(name) for name in commands)
    lines = [f"  {name:{width}}  {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: spkfast COMMAND [options]",
            "",
            "Speaker embeddings: training, extraction, verification.",
            "",
            *lines,
            "",
            "'spkfast COMMAND --help' lists the options of a command.",
        ]
    )
