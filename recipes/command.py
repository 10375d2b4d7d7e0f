"""What every recipe's command line shares: flags in groups, flag files, help, one-line errors."""

import contextlib
import ctypes
import difflib
import dis
import inspect
import logging
import math
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from recipes import processes

FLAGS = flags.FLAGS
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("layers", "pallas_kernels", "recipes", "sharding", "zoo")
_FLAG_FILES = _ROOT / "recipes" / "flags"
# Recipe (a module's name) -> title of a group -> its flags by name. They are in FLAGS while the
# recipe runs: so recipes that are imported together may have flags of the same name.
_recipes: dict[str, dict[str, dict[str, flags.Flag]]] = {}
RULES_HELP = (
    "How the model lies over the mesh: dp, fsdp, tp, or fsdp_tp; then FIELD=AXIS, with commas "
    "between, to lay a logical axis otherwise, as fsdp_tp,kv_heads=none where there are fewer key "
    "heads than the tensor axis is wide. AXIS is none, a mesh axis, or several with + between.")


class group:
    """``with group("Data"):`` makes the flags defined inside the recipe's, under that title."""

    def __init__(self, title: str):
        self._titles = _recipes.setdefault(sys._getframe(1).f_globals["__name__"], {})
        self._title = title

    def __enter__(self) -> None:
        self._before = set(FLAGS)

    def __exit__(self, *_) -> None:
        names = [name for name in FLAGS if name not in self._before]
        self._titles[self._title] = {name: FLAGS[name] for name in names}
        for name in names:
            delattr(FLAGS, name)


@contextlib.contextmanager
def _flags_of(main: Callable[[], None]) -> Iterator[None]:
    """The flags of a recipe, at their defaults."""
    mine = {name: flag for flags_by_name in _recipes.get(main.__module__, {}).values()
            for name, flag in flags_by_name.items()}
    for name, flag in mine.items():
        flag.unparse()
        FLAGS[name] = flag
    try:
        yield
    finally:
        for name in mine:
            delattr(FLAGS, name)
        FLAGS.unparse_flags()


def run(main: Callable[[], None], computes: bool = False) -> None:
    """Runs a recipe and exits: what its module ends with, under ``if __name__ == "__main__"``.

    Of one that `computes` step after step the process keeps the memory that it has.
    """
    try:
        if computes:
            _keep_memory()
        code = execute(main, sys.argv)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        processes.leave(code)
    sys.exit(code)


def _keep_memory() -> None:
    """Has glibc give no memory back, where that is the C library.

    On a CPU each execution takes its temporaries from malloc, which asks the system for large ones
    and hands them back; all their pages are then touched for the first time again. Kept, a training
    step of llama-60m takes 0.88 times as long. Only the main thread allocates from what is kept,
    so that computations have to run on it.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4  # Their numbers in malloc.h
        if mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1):
            jax.config.update("jax_cpu_enable_async_dispatch", False)


def execute(main: Callable[[], None], argv: Sequence[str]) -> int:
    """Parses `argv` (the program's name first), calls `main`, and returns the exit status.

    0 is success, 2 an error for the user, told in one line ``error: ...`` on stderr. For the user
    are the ValueErrors and RuntimeErrors that this project raises itself, and any OSError. All
    else is a bug, and passes through with its traceback.
    """
    try:
        with _plain_log(), _flags_of(main):
            if any(arg in ("-h", "-help", "--help") for arg in argv[1:]):
                print(_help(main))
            else:
                _parse(argv)
                main()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # As `| head` makes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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

    One flag may hold several, with commas between them. A later one wins, also over earlier ones of
    fields below its own: "a=none" drops an "a.b=1" before it.
    """
    found: dict[str, str] = {}
    for item in (part for text in items for part in text.split(",") if part.strip()):
        path, _, value = (part.strip() for part in item.partition("="))
        if not path or not value:
            raise ValueError(f"--set={item}: it must be FIELD=VALUE, as in --set=num_layers=6")
        found = {p: text for p, text in found.items() if not p.startswith(f"{path}.")}
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
        near = difflib.get_close_matches(error.flagname, list(FLAGS), n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        raise ValueError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if rest[1:]:
        raise ValueError(f"{rest[1]!r} is no flag; write --NAME=VALUE (--help lists the names)")
    for name in FLAGS:
        if isinstance(FLAGS[name].value, float) and not math.isfinite(FLAGS[name].value):
            raise ValueError(f"--{name}={FLAGS[name].value}: it must be finite; give a number such "
                             f"as --{name}={FLAGS[name].default or 0.1}")


def _find_flag_file(arg: str) -> str:
    """Looks for a --flagfile where it is said to be, then by its name among the recipes' own."""
    option, _, value = arg.partition("=")
    if option.lstrip("-") != "flagfile" or not value or Path(value).is_file():
        return arg
    own = {path.stem: str(path) for path in sorted(_FLAG_FILES.glob("*.flags"))}
    name = Path(value).name.removesuffix(".flags")
    if name not in own:
        raise ValueError(f"--flagfile={value}: there is no such file; the recipes' own are "
                         + ", ".join(own))
    return f"--flagfile={own[name]}"


def _help(main: Callable[[], None]) -> str:
    def paragraph(text):
        return textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)

    lines = [(inspect.getmodule(main).__doc__ or "").strip()]
    for title, flags_by_name in _recipes.get(main.__module__, {}).items():
        lines += ["", f"{title}:"]
        for name, flag in flags_by_name.items():
            default = "" if flag.default in (None, []) else flag.default
            lines += [f"  --{name}={default}", *paragraph(_words(flag))]
    lines += ["", "  --flagfile=FILE", *paragraph("Reads flags from a file, one a line, # before "
              "comments. What stands later on the command line wins.")]
    return "\n".join(lines)


def _words(flag: flags.Flag) -> str:
    """A flag's help as it was written, without what absl adds."""
    words = flag.help.partition(";\n")[0]
    return words.partition(">: ")[2] if isinstance(flag, flags.EnumFlag) else words


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


@contextlib.contextmanager
def _plain_log() -> Iterator[None]:
    """Log messages from warnings up go to stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
