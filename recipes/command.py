"""What every recipe's command line shares: flags in groups, flag files, help, one-line errors."""

import contextlib
import difflib
import dis
import inspect
import logging
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import flags

from recipes import processes

FLAGS = flags.FLAGS
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("layers", "pallas_kernels", "recipes", "sharding", "zoo")
_FLAG_FILES = _ROOT / "recipes" / "flags"
_groups: dict[str, list[str]] = {}  # Title -> names of flags, in the order of definition.


@contextlib.contextmanager
def group(title: str):
    """The flags defined inside stand under `title` in the recipe's help."""
    before = set(FLAGS)
    yield
    _groups[title] = [name for name in FLAGS if name not in before]


def run(main: Callable[[], None]) -> None:
    """Runs a recipe and exits: what its module ends with, under ``if __name__ == "__main__"``."""
    try:
        code = execute(main, sys.argv)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        processes.leave(code)
    sys.exit(code)


def execute(main: Callable[[], None], argv: Sequence[str]) -> int:
    """Parses `argv` (the program's name first), calls `main`, and returns the exit status.

    0 is success, 2 an error for the user, told in one line ``error: ...`` on stderr. For the user
    are the ValueErrors and RuntimeErrors that this project raises itself, and any OSError. All
    else is a bug, and passes through with its traceback.
    """
    _log_plainly()
    try:
        if any(arg in ("-h", "-help", "--help") for arg in argv[1:]):
            print(_help(main))
            return 0
        _parse(argv)
        main()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 2)
    except (ValueError, RuntimeError) as error:
        if not _raised_here(error):
            raise
        return _fail(str(error), 2)
    return 0


def settings(items: Iterable[str]) -> dict[str, str]:
    """The ``--set`` flags ["num_layers=6", "attention.window=512"] as {path: text}.

    One flag may hold several, with commas between them.
    """
    found: dict[str, str] = {}
    for item in (part for text in items for part in text.split(",") if part.strip()):
        path, _, value = (part.strip() for part in item.partition("="))
        if not path or not value:
            raise ValueError(f"--set={item}: it must be FIELD=VALUE, as in --set=num_layers=6")
        found[path] = value
    return found


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this project raised it.

    The last frame's file alone does not tell: jax removes its own frames from tracebacks.
    """
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    file = Path(code.co_filename).resolve()
    return (any(file.is_relative_to(_ROOT / package) for package in _PACKAGES)
            and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"])


def _parse(argv: Sequence[str]) -> None:
    """Reads the command line, and the flag files it names, into FLAGS."""
    try:
        rest = FLAGS([argv[0], *map(_find_flag_file, argv[1:])])
    except flags.UnrecognizedFlagError as error:
        known = [name for names in _groups.values() for name in names]
        raise ValueError(
            f"unknown flag --{error.flagname}{_nearest(error.flagname, known, '--')}") from None
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if rest[1:]:
        raise ValueError(f"{rest[1]!r} is no flag; write --NAME=VALUE (--help lists the names)")


def _find_flag_file(arg: str) -> str:
    """Looks for a --flagfile where it is said to be, then by its name among the recipes' own."""
    option, _, value = arg.partition("=")
    if option.lstrip("-") != "flagfile" or not value or Path(value).is_file():
        return arg
    own = {path.stem: str(path) for path in sorted(_FLAG_FILES.glob("*.flags"))}
    name = Path(value).name.removesuffix(".flags")
    if name not in own:
        raise ValueError(f"--flagfile={value}: there is no such file{_nearest(name, own)}")
    return f"--flagfile={own[name]}"


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists the flags"


def _help(main: Callable[[], None]) -> str:
    def paragraph(text):
        return textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)

    lines = [(inspect.getmodule(main).__doc__ or "").strip()]
    for title, names in _groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            flag = FLAGS[name]
            default = "" if flag.default is None else str(flag.default)
            lines += [f"  --{name}={default}", *paragraph(flag.help)]
    lines += ["", "  --flagfile=FILE", *paragraph("Reads flags from a file, one a line, # before "
              "comments. What stands later on the command line wins.")]
    return "\n".join(lines)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


def _log_plainly() -> None:
    """Log messages from warnings up go to stderr, one line each."""
    root = logging.getLogger()
    if not any(isinstance(handler.formatter, _Plain) for handler in root.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        root.addHandler(handler)
