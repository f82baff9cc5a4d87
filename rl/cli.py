"""`trimtab-rl`: reads a recipe, checks everything, then trains.

    trimtab-rl --config chain_sum_cpu --updates 30 --update.lr 2e-4
    trimtab-rl --config recipe.yaml --trainer.devices 2 --trainer.strategy ddp
    trimtab-rl --resume runs/RUN
    trimtab-rl report runs/RUN
    trimtab-rl compare runs/A runs/B --output compare.html
    trimtab-rl eval runs/RUN --samples 16
    trimtab-rl doctor
    trimtab-rl length-trigger METRICS.jsonl

Bad input ends with one line and exit code 2 before anything is written.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .explain import explain

if TYPE_CHECKING:
    from .run import Run

RECIPES = Path(__file__).parent / "recipes"

# What a run may set of Lightning's Trainer; the rest is the loop's own business.
TRAINER_OPTIONS = {
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "max_steps",
    "max_time",
    "callbacks",
    "plugins",
    "profiler",
    "deterministic",
    "benchmark",
    "detect_anomaly",
    "enable_progress_bar",
}
# What may differ between a run and its continuation without changing what it computes.
FREE_ON_RESUME = (
    "updates",
    "run_dir",
    "record.",
    "health.",
    "rollout.server",
    "trainer.max_",
    "trainer.enable_",
    "trainer.prof",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `trimtab-rl`.

    Args:
        argv: arguments; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        # Lightning starts the other ranks with this command line, in the directory this one is in
        # by then (see _go_to_where_it_started): relative paths mean what they meant here.
        os.chdir(os.environ.setdefault("TRIMTAB_CALLED_IN", os.getcwd()))
    command = arguments[0] if arguments else ""
    try:
        if command == "doctor":  # before anything of the extra `rl` is imported
            COMMANDS[command](arguments[1:])
            return
        quieten()
        if command in COMMANDS:
            COMMANDS[command](arguments[1:])
            return
        work = _evaluation(arguments[1:]) if command == "eval" else prepared(arguments).train
    except ModuleNotFoundError as missing:
        if missing.name not in ("jsonargparse", "rich", "matplotlib", "tensorboard"):
            raise
        _refuse(ValueError(f"{missing.name} is not installed; pip install 'trimtab[rl]'"))
    except (ValueError, ArgumentError, OSError) as error:  # OSError names the file it is about
        _refuse(error)
    work()  # from here on an error is ours, or the machine's: a traceback is what helps


def prepared(arguments: list[str]) -> Run:
    """The run that these arguments ask for, checked; nothing of it is written yet.

    Args:
        arguments: of the command line, without the other commands' ones.

    Returns:
        A Run whose `train` is next.

    Raises:
        ValueError, ArgumentError, OSError: what `main` ends with in one line.
        ModuleNotFoundError: a package of the extra `rl` is missing.
    """
    config, trainer_options, resume, text = parse(make_parser(), arguments)
    from .run import Run

    run = Run(config, trainer_options, resume, text)
    run.prepare()
    return run


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError(f"report: expected one run folder, got {arguments}")
    from .html_report import write_html_report
    from .recording import RunFolder
    from .report import draw_report

    folder = RunFolder.existing(arguments[0])
    draw_report(folder.metrics, folder.report)
    print(folder.report)
    print(write_html_report(folder.path))


def _compare(arguments: list[str]) -> None:
    from .compare import main as compare

    compare(arguments)


def _doctor(arguments: list[str]) -> None:
    from .doctor import main as doctor

    doctor(arguments)


def _length_trigger(arguments: list[str]) -> None:
    from .length_trigger import main as length_trigger

    length_trigger(arguments)


def _evaluation(arguments: list[str]) -> Callable[[], None]:
    from .evaluate_run import prepared as prepared_evaluation

    return prepared_evaluation(arguments).run


COMMANDS = {
    "report": _report,
    "compare": _compare,
    "doctor": _doctor,
    "length-trigger": _length_trigger,
}


def make_parser() -> Any:
    """The argument parser: RLConfig at the top level, Lightning's Trainer under `trainer`."""
    import pytorch_lightning as pl
    from jsonargparse import ArgumentParser

    from .config import RLConfig

    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser = ArgumentParser(
        prog="trimtab-rl",
        description="Reinforcement learning of a language model on verifiable rewards.",
        epilog=f"Packaged recipes: {names}. `trimtab-rl report RUN` draws a run's reports again; "
        "`trimtab-rl compare RUN RUN...` sets runs side by side; `trimtab-rl eval RUN` samples a "
        "run's policy (pass@k, majority vote); `trimtab-rl doctor` says what is installed; "
        "`trimtab-rl length-trigger METRICS.jsonl` replays a length-triggered rate over a log.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="a recipe: a file or a packaged name")
    parser.add_argument(
        "--resume", type=str | None, default=None, help="run folder to continue, exactly"
    )
    parser.add_class_arguments(RLConfig, None)
    options = inspect.signature(pl.Trainer).parameters
    parser.add_class_arguments(
        pl.Trainer,
        "trainer",
        skip={name for name in options if name not in TRAINER_OPTIONS},
        instantiate=False,
    )
    return parser


def parse(parser: Any, arguments: list[str]) -> tuple[Any, dict[str, Any], str | None, str]:
    """Arguments as objects.

    Args:
        parser: from `make_parser`.
        arguments: of the command line.

    Returns:
        RLConfig, options of the Trainer, the folder to resume or None, and the resolved
        configuration as YAML.

    Raises:
        ValueError, ArgumentError: an argument is wrong; nothing has been written.
    """
    import yaml  # not above: `doctor` runs without it

    arguments = [_packaged(arguments, i) for i in range(len(arguments))]
    try:
        resume = _resume_folder(arguments)
        given = any(a == "--config" or a.startswith("--config=") for a in arguments)
        if resume is not None:
            resume = str(Path(resume).resolve())
            _go_to_where_it_started(Path(resume))
        if resume is not None and not given:
            stored = _checked(str(Path(resume) / "config.yaml"))
            arguments = ["--config", stored, *arguments]
        elif not given and not any(
            re.match(r"-h$|--[\w.]*help\b|--print_config", a) for a in arguments
        ):
            names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
            raise ValueError(
                f"--config: expected a recipe, a file or a packaged one ({names}), got none; "
                "--help lists what it may hold"
            )
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(explain(error, TRAINER_OPTIONS)) from error
    if (parsed.resume is None) != (resume is None):
        raise ValueError("resume: expected on the command line, found in the recipe")
    text = _resolved(parser, parsed)
    if resume is not None:
        stored = yaml.safe_load((Path(resume) / "config.yaml").read_text(encoding="utf-8"))
        if not parsed.threads:  # what 0 chose when the run began
            parsed.threads = stored["threads"]
            text = _resolved(parser, parsed)
        # options that are younger than the run, at their defaults
        path = _checked(str(Path(resume) / "config.yaml"))
        whole = yaml.safe_load(_resolved(parser, parser.parse_args(["--config", path])))
        _refuse_changes(whole | {"threads": stored["threads"]}, yaml.safe_load(text))
    try:
        made = parser.instantiate(parsed)
    except (ArgumentError, ValueError) as error:
        raise ValueError(explain(error, TRAINER_OPTIONS)) from error
    from .config import RLConfig

    config = RLConfig(**{f.name: made[f.name] for f in dataclasses.fields(RLConfig)})
    return config, dict(vars(made["trainer"])), resume, text


def _packaged(arguments: list[str], i: int) -> str:
    """The argument, or the path of the packaged recipe it names."""
    argument = arguments[i]
    if argument.startswith("--config="):
        return f"--config={_recipe_path(argument.partition('=')[2])}"
    if i and arguments[i - 1] == "--config":
        return _recipe_path(argument)
    return argument


def _recipe_path(name: str) -> str:
    packaged = RECIPES / f"{name}.yaml"
    if Path(name).is_file() or not packaged.is_file():
        if not Path(name).is_file():
            names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
            raise ValueError(
                f"--config: no file and no packaged recipe {name!r} (packaged: {names})"
            )
        return str(Path(_checked(name)).resolve())
    return str(packaged)


def _checked(path: str) -> str:
    """The path of a file that holds YAML keys; the parser would name neither file nor line."""
    import yaml

    try:
        keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path}: expected configuration keys, got {keys!r:.60}")
    return path


def _resume_folder(arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "--resume":
            if i + 1 == len(arguments):
                raise ValueError("--resume: expected a run folder, got none")
            folder = arguments[i + 1]
        elif argument.startswith("--resume="):
            folder = argument.partition("=")[2]
        else:
            continue
        if not (Path(folder) / "config.yaml").is_file():
            raise ValueError(f"--resume: {folder} is no run folder (no config.yaml in it)")
        return folder
    return None


def _resolved(parser: Any, parsed: Any) -> str:
    kept = parsed.clone()
    for own in ("config", "resume"):
        kept.pop(own, None)
    return parser.dump(kept, skip_validation=True, skip_unset=False)


def _go_to_where_it_started(folder: Path) -> None:
    """Relative paths and reward modules of a run mean what they meant in its first directory."""
    record = folder / "environment.json"
    started_in = json.loads(record.read_text())["started_in"] if record.is_file() else None
    if started_in is not None and Path(started_in) != Path.cwd():
        if not Path(started_in).is_dir():
            raise ValueError(f"--resume: {folder} was started in {started_in}, which is gone")
        print(f"going to {started_in}, where {folder} was started", flush=True)
        os.chdir(started_in)


def _refuse_changes(stored: Any, now: Any) -> None:
    before, after = _flat(stored), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        # as text: the command line has '1' where a file has 1
        if str(before.get(key)) != str(after.get(key)) and not key.startswith(FREE_ON_RESUME):
            raise ValueError(
                f"--resume: {key} was {before.get(key)!r} in that run, got {after.get(key)!r}; "
                "a continued run keeps its configuration"
            )


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {key: tree}
    items = [_flat(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()]
    return {k: v for item in items for k, v in item.items()}


def _refuse(error: Exception) -> NoReturn:
    print(f"trimtab-rl: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


def quieten() -> None:
    """Leaves on the terminal what a person needs; warnings of the libraries below stay in reach."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("trimtab").setLevel(logging.INFO)
    import pytorch_lightning  # noqa: F401 (its import sets its loggers' level)

    for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        for package in ("pytorch_lightning", "lightning_fabric", "jsonargparse", "torch.utils"):
            warnings.filterwarnings("ignore", module=package)
