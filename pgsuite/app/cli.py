"""Command lines: configurations are composed by Hydra; users' mistakes give one message and no traceback."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pgsuite import distributed
from pgsuite.app import help as help_page
from pgsuite.app import resume, schema, sweeps  # noqa: F401  (its resolvers, in every process of a sweep)
from pgsuite.app.build import instantiate, to_dict
from pgsuite.distributed import LostProcessError
from pgsuite.envs.base import BrokenEnvError
from pgsuite.errors import UserError, install, place, reason
from pgsuite.settings import closest
from pgsuite.training.callbacks import console
from pgsuite.training.run_lock import RunLock

PACKAGE = Path(__file__).parents[1]
CONFIGS = next(folder / "configs" for folder in (PACKAGE, PACKAGE.parent) if (folder / "configs").is_dir())
REQUIRED = {"algo": "algo=ppo", "env": "env=HalfCheetah"}  # groups without which nothing can be composed: an example
LONGEST = 500  # characters of a message
MENDABLE = (UserError, BrokenEnvError, LostProcessError, HydraException, OmegaConfBaseException, OSError)
# Errors that Hydra raises for command lines that it cannot compose.
UNCOMPOSABLE = (AssertionError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
LOST = (
    "a process of this run was lost ({}), so all of them end. Whatever was saved is intact: the same command with "
    "resume=auto goes on from there, and torchrun --max-restarts=3 has it do so by itself"
)


def main(task: Callable[[DictConfig], Any], config: str, *, processes: bool = False) -> None:
    """Run a task with a named configuration and the overrides of the command line.  Only tasks with ``processes`` may
    run under torchrun.

    Exits with code 1 and one message for mistakes of the user, and with 130 when interrupted; warnings are messages
    too.  With HYDRA_FULL_ERROR=1 tracebacks are shown, and where warnings are raised.
    """
    verbose = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
    schema.register()
    given, stdout, formatted = list(sys.argv), sys.stdout, warnings.formatwarning
    if not verbose:
        warnings.formatwarning = partial(format_warning, formatted)
    sys.stdout = console().file
    sys.argv[1:] = [part for argument in sys.argv[1:] for part in replacing(argument)]
    composed = False

    def guarded(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except KeyboardInterrupt:
            sys.exit(130)
        except MENDABLE as error:
            if distributed.size() > 1:
                # torchrun's, which would end the process before the message
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if verbose:
                raise
            # An error of one process ends all of them; the first to notice prints the message.
            words = explain(error) if composed else uncomposable(error, sys.argv[1:])
            sys.exit(f"error: {shorten(words)}" if distributed.first("error") else 1)
        except UNCOMPOSABLE as error:
            if verbose or composed:
                raise
            sys.exit(f"error: {shorten(uncomposable(error, sys.argv[1:]))}")

    # The task is guarded too, since Hydra prints a line about any exception that passes through it.
    @wraps(task)
    def job(cfg: DictConfig) -> Any:
        nonlocal composed
        composed = True
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            return _one_of_many(task, cfg)
        return guarded(lambda: task(cfg))

    def compose() -> None:
        nonlocal composed
        if distributed.size() > 1:
            _divide(processes)
        if help_page.asked():
            sys.stdout = stdout  # of which a pager may read as much as it likes
            found = help_page.composed(config, str(CONFIGS))
            composed = True
            help_page.show(config, *found)
            return
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)(job)()

    def together() -> None:
        with distributed.group():
            guarded(compose)  # within the group, which decides which process prints the message

    try:
        guarded(together)
    finally:
        sys.argv[:], sys.stdout, warnings.formatwarning = given, stdout, formatted
        if not verbose:
            os.environ.pop("HYDRA_FULL_ERROR", None)  # child processes that start later would show tracebacks


def format_warning(formatted: Callable[..., str], message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning for the user without the line of the package, or of torch, that gives it; others as ``formatted``."""
    return f"warning: {message}\n" if category is UserWarning else formatted(message, category, *where)


def main_with_settings(work: Callable[[Any, Path, Callable[[str], None]], Any], config: str) -> None:
    """Run ``work(settings, folder, say)`` in a run directory that no other process uses, with the dataclass that the
    named configuration describes."""

    def task(cfg: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        say = console().print
        settings, lock = instantiate(to_dict(cfg), config), RunLock()
        lock.take(folder)
        try:
            work(settings, folder, say)
        finally:
            lock.release()

    main(task, config)


def _divide(processes: bool) -> None:
    """Under torchrun, let only the first process print and create a run directory.  Raises UserError for commands that
    run in one process, and for sweeps."""
    if not processes:
        raise UserError(f"{sys.argv[0]} is not for torchrun, which is for training: start it without")
    if {"-m", "--multirun"} & set(sys.argv):
        raise UserError("torchrun trains one run in several processes: leave out -m, or start a sweep with python")
    if distributed.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]


def _one_of_many(task: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Run one job of a sweep.  An error is printed at once, and again by Hydra after the other jobs."""
    try:
        return task(cfg)
    except MENDABLE as error:
        hydra_cfg = HydraConfig.get()
        job = f"job {hydra_cfg.job.num} ({' '.join(hydra_cfg.overrides.task)})"
        print(f"error: {job}: {shorten(explain(error))}", file=sys.stderr, flush=True)
        raise UserError(f"{job} failed, and perhaps others, as said above: {explain(error)}") from None


def replacing(argument: str) -> list[str]:
    """The override, preceded by one with null if its value is a dictionary, so that a schedule or component replaces
    that of the recipe; Hydra would merge the two.  seed=0..15 and batch(...) as what they are short for."""
    setting, given, value = argument.partition("=")
    if setting == "seed" and (ends := re.fullmatch(r"(\d+)\.\.(\d+)", value)):
        first, last = map(int, ends.groups())
        if first <= last:
            return [f"seed={first}", f"seeds={last - first + 1}"]
    if value.startswith("batch(") and value.endswith(")"):
        return [f"+batch.{setting}=[{value[6:-1]}]"]
    return (
        [f"{setting}=null", argument]
        if given and setting.startswith(("algo.", "policy.", "critic.", "sweep.space.")) and value[:1] == "{"
        else [argument]
    )


def uncomposable(error: BaseException, arguments: Sequence[str]) -> str:
    """Message for an error while a configuration is composed of these command line arguments."""
    parser, overrides = OverridesParser.create(), list[Override]()
    for argument in get_args_parser().parse_known_args(arguments)[0].overrides:
        try:
            overrides.append(parser.parse_override(argument))
        except HydraException as reason:
            return _unparsed(argument, str(reason))
    said = str(error)
    if (mistake := resume.misplaced(overrides, said)) is not None:
        return mistake
    if "Could not override" not in said:  # a single setting, which the message names
        for override in overrides:
            group, value = CONFIGS / override.key_or_group, override.value()
            if override.is_delete() and (example := REQUIRED.get(override.key_or_group)):
                return f"{override.input_line}: it cannot be left out, only chosen, as in {example}"
            named = isinstance(value, str | dict) or override.is_delete() or override.is_sweep_override()
            if group.is_dir() and not named:
                choices = [path.stem for path in group.glob("*.yaml")]
                leave = "; ~tuned leaves the recipe out" if group.name == "tuned" else ""
                return (
                    f"{override.input_line}: a group takes the name of one of its choices, as in algo=ppo: "
                    f"{closest(str(value), choices)}{leave}"
                )
    return explain(error) if isinstance(error, MENDABLE) else f"no configuration can be composed of that: {said}"


def _unparsed(argument: str, reason: str) -> str:
    """Message for an argument that is no override in Hydra's grammar."""
    setting, given, value = argument.partition("=")
    if not given and Path(argument).exists():
        return f"{argument!r} is a path, and settings are written as run={argument} or resume={argument}"
    if not given:
        return f"{argument!r} is no setting, which are written as algo.lr=1e-3 ({reason})"
    if re.search(r"[^\w./@+~-]", setting):
        return f"{argument!r}: {setting!r} is no name of a setting: they are of letters, digits, dots and slashes"
    plain = value.isprintable() and not set("\"'\\") & set(value)
    quoted = shlex.quote(f'{setting}="{value}"') if plain else f"'{setting}=\"...\"'"
    return (
        f"{argument!r} cannot be read ({reason.partition(' expecting ')[0]}): lists are written as [1, 2], "
        f"dictionaries as {{a: 1}}, and other text with such characters in quotes, within the shell's: {quoted}"
    )


def shorten(message: str) -> str:
    """A message in one line, cut off at ``LONGEST`` characters."""
    message = " ".join(message.splitlines())
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 4]} ..."


def explain(error: BaseException) -> str:
    """Message for an error: the mistake, where it is, and how to correct it."""
    if isinstance(error, UserError | BrokenEnvError):
        return str(error)
    if isinstance(error, LostProcessError):
        return LOST.format(error)
    chain = [error]
    while (following := chain[-1].__cause__) is not None:
        chain.append(following)
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
        if isinstance(link, MissingConfigException):
            return _missing(link)
        if isinstance(link, OmegaConfBaseException):
            return _value(link)
        if isinstance(link, ConfigCompositionException) and isinstance(link.__context__, OmegaConfBaseException):
            return _within(link, link.__context__)
    if isinstance(error, OSError):
        if at := place(error):  # of code of the user's own, which may have been reading
            return f"{at}{reason(error)}"
        verb = "find" if isinstance(error, FileNotFoundError) else "write"
        return f"cannot {verb} {error.filename or 'the run directory'}: {error.strerror or error}"
    return " ".join(str(error).split("\n\n")[0].split())


def _missing(error: MissingConfigException) -> str:
    """Message for an unknown choice of a group, such as env=HalfCheeta."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return " ".join(str(error).split())
    if group in ("hydra/launcher", "hydra/sweeper"):
        extra = {"submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}.get(name, "sweep")
        return f"{group}={name} needs hydra-{name.split('_')[0]}-{group[6:]}: {install(extra)}"
    return f"no {group} {name!r}; {closest(name, error.options or [])}"


def _within(error: ConfigCompositionException, inner: OmegaConfBaseException) -> str:
    """Message for a configuration file, such as a recipe, with a setting that the other choices do not have."""
    if (found := re.match(r"In '(.+?)'", str(error))) is None:
        return _value(inner)
    name = found[1]
    if name.startswith("tuned/"):
        return f"the recipe {name[6:]} does not go with the other choices: {_value(inner)}; ~tuned leaves it out"
    return f"{name}: {_value(inner)}"


def _value(error: OmegaConfBaseException) -> str:
    """Message for an unknown key or a value of the wrong type."""
    key = str(error.full_key or error.key)
    parent, _, name = key.rpartition(".")
    node = error.parent_node
    if isinstance(node, DictConfig) and name not in node:
        options = [str(option) for option in node if not str(option).startswith("_")]
        where = f" in {parent}" if parent else ""
        return f"no setting {name!r}{where}; {closest(name, options)}"
    first = str(error.msg or error).splitlines()[0]
    if "does not support deletion" in first:
        first = "a setting cannot be taken away, only given another value"
    return f"{key}: {first}" if key else first
