"""One run from its configuration to its folder: policy, trainer, training, report."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from .collect import prompt_ids
from .config import PolicyConfig, RLConfig
from .dashboard import run_display
from .data import ProblemData
from .durable import DurableCheckpointIO, is_disk_error, raise_on_all, replace_text, sync
from .evaluation import evaluate
from .health import Stopped
from .html_report import write_html_report
from .loop import RLModule
from .lora import base_view, save_adapter
from .machine import environment, fastest_threads
from .prefix_support import refuse_unsupported
from .ranks import check_shares, refuse_precision, refuse_strategy
from .recording import (
    MetricsWriter,
    RunFolder,
    TensorBoard,
    TranscriptWriter,
    progress_display,
    read_rows,
    replaced_folder,
)
from .report import draw_report, print_table
from .run_record import wall_seconds
from .server_client import ServerFailed
from .server_engine import check_servers
from .sharding import full_parameters, stored_buffers
from .tasks import Task
from .vllm_engine import refuse_missing_vllm
from .warmup import warm_up

logger = logging.getLogger(__name__)


class Run:
    """A run, checked and ready; nothing is written before `train`.

    Args:
        config: what to run.
        trainer_options: of Lightning's Trainer.
        resume: folder of the run to continue, or None.
        text: the resolved configuration, for the folder.

    Raises:
        ValueError: something in the configuration cannot be done on this machine.
    """

    def __init__(
        self, config: RLConfig, trainer_options: dict[str, Any], resume: str | None, text: str
    ) -> None:
        self.config, self.text = config, text
        if "RANK" in os.environ:  # Lightning read it as it was imported: before Ray has set it
            rank_zero_only.rank = int(os.environ["RANK"])
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if resume is not None:
            self.folder = RunFolder.existing(resume)
        elif rank_zero_only.rank == 0:
            name = type(config.task).__name__.removesuffix("Task").lower()
            self.folder = RunFolder.fresh(config.run_dir, name)
        else:  # the first process has just made it
            self.folder = RunFolder(Path(config.run_dir or "runs/of-rank-0"))
        for name, model in (("policy", config.policy), ("teacher", config.teacher)):
            if model is not None and model.path is not None:
                check_policy_folder(model.path, name)
        self.resuming = resume is not None
        self.checkpoint = self.folder.newest_checkpoint() if self.resuming else None
        self.updates_done = 0 if self.checkpoint is None else updates_of(self.checkpoint)
        self.complete = self.updates_done >= config.updates and self.folder.finished(
            self.updates_done
        )
        self.trainer = self._trainer(dict(trainer_options))
        refuse_strategy(self.trainer.strategy, config.update, config.policy.lora)
        refuse_precision(self.trainer.precision)
        check_shares(config.rollout.prompts, self.trainer.world_size)
        if not isinstance(config.task, Task):
            raise ValueError(f"task: expected a Task, got {type(config.task).__name__}")

    def prepare(self) -> None:
        """Loads the policy (or warms one up) and the checkpoint; writes only the warm-up's cache.

        Raises:
            ValueError: the policy cannot be loaded, the optimizer refuses its options, or the
                checkpoint does not fit.
        """
        config = self.config
        if self.complete:
            return
        if config.rollout.engine == "vllm":
            refuse_missing_vllm(self.trainer.world_size)
        cores = (os.cpu_count() or 1) // max(1, self.trainer.num_devices)
        threads = config.threads or fastest_threads(cores)
        torch.set_num_threads(threads)
        stored = yaml.safe_load(self.text) | {"threads": threads}
        stored["trainer"] |= {"max_steps": -1, "max_time": None}  # limits of this start only
        self.text = yaml.safe_dump(stored, sort_keys=False)
        policy, tokenizer = load_policy(config.policy, config.task)
        refuse_unsupported(policy)
        refuse_tokenizer(tokenizer, policy, config)
        if config.rollout.servers:
            prompt = len(prompt_ids(tokenizer, config.task.problem("train", 0)))
            check_servers(
                config.rollout.servers,
                policy,
                config.rollout.server_timeout,
                layers=rank_zero_only.rank == 0,
                tokens=prompt + config.rollout.max_tokens,
            )
        teacher = None
        if config.teacher is not None:
            teacher = load_teacher(config.teacher, config.task, policy, tokenizer)
            size = teacher.get_input_embeddings().num_embeddings
            top_k = config.update.imitation.teacher_top_k
            if top_k is not None and top_k > size:
                raise ValueError(
                    f"update.imitation.teacher_top_k: expected at most the {size} of the "
                    f"vocabulary, got {top_k}"
                )
        self.module = RLModule(config, policy, tokenizer, config.task, teacher)
        self.module.configure_optimizers()  # so that a rate or a block map it refuses shows here
        if self.checkpoint is not None:
            check_checkpoint(self.checkpoint, self.module)

    def train(self) -> None:
        """Trains to the end, and leaves the report.

        Raises:
            SystemExit: 3 where it stopped early and a resume goes on, after a line that says why:
                a disk error, an engine that is gone, an update that is not healthy; 130 after
                Ctrl-C.
        """
        try:
            self._train()
        except (OSError, ServerFailed, Stopped) as why:
            ours = isinstance(why, Stopped | ServerFailed | ConnectionError)
            if not ours and not is_disk_error(why):
                raise
            if rank_zero_only.rank == 0:
                last = self.folder.newest_checkpoint()
                text = getattr(why, "strerror", None) or why  # without its number
                where = getattr(why, "filename", None)
                print(
                    f"trimtab-rl: stopped: {text}{f': {where}' if where else ''}\nnothing before "
                    f"{'the first update' if last is None else last.stem} is lost: "
                    f"trimtab-rl --resume {self.folder.path} goes on from there",
                    file=sys.stderr,
                    flush=True,
                )
            raise SystemExit(3) from None

    def _train(self) -> None:
        folder = self.folder
        if self.complete:
            print(f"{folder.path} is complete: {self.updates_done} updates. --updates raises them.")
            return
        if rank_zero_only.rank != 0:
            self._fit()
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.in_use():
            self._begin()
            self._fit()

    def _begin(self) -> None:
        """What the first process writes and clears before anything else."""
        folder = self.folder
        if self.checkpoint is not None:
            print(f"continuing {folder.path} after update {self.updates_done}", flush=True)
        elif self.resuming:
            print(f"{folder.path} has no whole checkpoint: from its beginning", flush=True)
        folder.clear_unfinished()
        if not self.resuming:
            print(f"run folder: {folder.path}", flush=True)
            replace_text(folder.environment, json.dumps(environment(), indent=1))
        replace_text(folder.config, self.text)
        folder.forget_after(self.updates_done)
        for newer in folder.checkpoints.glob("update=*.ckpt"):
            if newer > folder.checkpoint(self.updates_done):
                newer.unlink()  # it could not be read

    def _fit(self) -> None:
        config, folder = self.config, self.folder
        try:
            self.trainer.fit(
                self.module,
                ProblemData(config),
                ckpt_path=self.checkpoint,
                weights_only=True,
            )
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
            if rank_zero_only.rank == 0:
                print(f"interrupted: trimtab-rl --resume {folder.path} goes on", flush=True)
            raise SystemExit(130) from None
        finally:
            self.module.teardown("fit")  # Lightning leaves it out after an error
        # where max_steps or max_time stopped the run, or for a continuation with more updates
        self.checkpoints.save(self.trainer, self.module)
        weights = {}
        for name, tensor in full_parameters(self.module.policy):  # all ranks, if it is sharded
            if rank_zero_only.rank == 0:  # gathered or merged: not all of it on the device
                weights[name] = tensor.cpu()
        if rank_zero_only.rank == 0:
            self._finish(weights)

    def _trainer(self, options: dict[str, Any]) -> pl.Trainer:
        record, folder = self.config.record, self.folder
        asked = options.get("accelerator")
        usable = torch.cuda.is_available() or (asked == "gpu" and torch.backends.mps.is_available())
        if asked in ("gpu", "cuda") and not usable:
            raise ValueError(
                f"trainer.accelerator: expected cpu, got {asked!r}: no usable CUDA device here"
            )
        durable = DurableCheckpointIO()
        plugins = options.pop("plugins", None) or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        self.checkpoints = CheckpointWriter(
            folder, record.checkpoint_every, record.keep_checkpoints, durable
        )
        extra = options.pop("callbacks", None) or []
        shown = options.pop("enable_progress_bar", None) is not False
        display = run_display(folder.metrics, self.config.updates) if shown else None
        callbacks: list[Callback] = [
            HeldOutEvaluation(folder),
            MetricsWriter(folder.metrics),
            TranscriptWriter(
                folder.transcripts,
                record.transcripts_every,
                record.transcripts,
                self.config.updates,
            ),
            self.checkpoints,
            *([display] if display is not None else []),
            *(extra if isinstance(extra, list) else [extra]),
        ]
        try:
            return pl.Trainer(
                max_epochs=1,
                logger=TensorBoard(
                    folder.path, name="", version="tensorboard", purge_step=self.updates_done + 1
                ),
                callbacks=callbacks,
                default_root_dir=folder.path,
                log_every_n_steps=1,
                num_sanity_val_steps=0,
                enable_model_summary=False,
                enable_progress_bar=False,  # Lightning's own, beside ours
                use_distributed_sampler=False,
                plugins=[*plugins, durable],
                **{name: value for name, value in options.items() if value is not None},
            )
        except (MisconfigurationException, RuntimeError, TypeError, ValueError) as refused:
            raise ValueError(f"trainer: {refused}") from refused

    def _finish(self, weights: dict[str, torch.Tensor]) -> None:
        module, folder = self.module, self.folder
        if not folder.metrics.is_file():
            return
        rows = read_rows(folder.metrics)
        summary = json.loads(folder.summary.read_text()) if folder.summary.is_file() else {}
        summary["seconds"] = wall_seconds(rows)
        summary["health"] = module.health.summary()
        draw_report(folder.metrics, folder.report)
        if module.updates_done < self.config.updates:
            self._write_page()
            print(f"stopped after update {module.updates_done}: --resume {folder.path} goes on")
            return
        with replaced_folder(folder.policy) as unfinished:
            weights |= stored_buffers(module.policy)
            base_view(module.policy).save_pretrained(unfinished, state_dict=weights)
            module.tokenizer.save_pretrained(unfinished)
        if (lora := self.config.policy.lora) is not None:
            with replaced_folder(folder.adapter) as unfinished:
                save_adapter(module.policy, lora, unfinished)
        summary["updates"] = module.updates_done  # last: it says that the run is finished
        replace_text(folder.summary, json.dumps(summary, indent=1))
        self._write_page()  # it says that the run is finished, so it comes last
        print_table(summary, folder.path)
        if module.skipped_updates >= module.updates_done:
            print("WARNING: nothing was trained: every update was skipped (why, stands above)")

    def _write_page(self) -> None:
        try:
            write_html_report(self.folder.path)
        except ValueError as error:  # a file of the folder that somebody edited
            logger.warning("report.html is not written: %s", error)


class CheckpointWriter(Checkpoint):
    """Writes a checkpoint every few updates and keeps the newest.

    By updates, not by optimizer steps as ModelCheckpoint counts: an update may take several steps,
    or skip one. A `Checkpoint`, because Lightning calls those after all other callbacks. Every one
    is healthy: after a step that ruins a weight or the optimizer's state the run goes back, or
    stops, before this is called.

    Args:
        folder: of the run.
        every: updates between checkpoints.
        keep: newest checkpoints kept.
        durable: writes them.
    """

    def __init__(
        self, folder: RunFolder, every: int, keep: int, durable: DurableCheckpointIO
    ) -> None:
        self.folder, self.every, self.keep, self.durable = folder, every, keep, durable
        self.saved = -1

    def setup(self, trainer: pl.Trainer, module: RLModule, stage: str) -> None:
        module.health.checkpoint_before = self.regular

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: RLModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # after going back, the weights are those of a checkpoint that exists
        if module.updates_done % self.every == 0 and not module.health.went_back:
            self.save(trainer, module)

    def regular(self, updates: int, back: int) -> Path | None:
        """The `back`-th newest checkpoint of up to so many updates, else the oldest, else None.

        Only those that any run of this configuration has, not one that was written because a run
        was stopped: going back must not depend on interruptions.
        """
        found = [path for path in self._regular() if path <= self.folder.checkpoint(updates)]
        return found[-min(back, len(found))] if found else None

    def save(self, trainer: pl.Trainer, module: RLModule) -> None:
        """Writes the checkpoint of this update, unless it is written; every process must call.

        Raises:
            OSError: it could not be written; the ones before it are still there.
        """
        if self.saved == module.updates_done:
            return
        sync(self.folder.metrics)  # a checkpoint must not outlive the lines of its updates
        trainer.save_checkpoint(self.folder.checkpoint(module.updates_done))
        self.durable.raise_together()
        self.saved = module.updates_done
        if rank_zero_only.rank == 0:
            kept = {self.folder.checkpoint(module.updates_done), *self._regular()[-self.keep :]}
            for old in set(self.folder.checkpoints.glob("update=*.ckpt")) - kept:
                old.unlink()

    def _regular(self) -> list[Path]:
        paths = sorted(self.folder.checkpoints.glob("update=*.ckpt"))
        return [path for path in paths if int(path.stem.partition("=")[2]) % self.every == 0]


class HeldOutEvaluation(Callback):
    """Accuracy on held-out problems before the first update and after the last.

    Args:
        folder: of the run; its summary keeps the results.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, module: RLModule) -> None:
        if module.updates_done == 0:
            self._evaluate(module, "before")

    def on_train_end(self, trainer: pl.Trainer, module: RLModule) -> None:
        if module.updates_done >= module.config.updates:
            self._evaluate(module, "after")

    def _evaluate(self, module: RLModule, when: str) -> None:
        if not module.config.evaluation.problems:
            return
        started = time.time()
        if rank_zero_only.rank == 0:
            problems = module.config.evaluation.problems
            print(f"evaluating {problems} held-out problems ({when})", flush=True)
        result = evaluate(module, module.engine, module.updates_done).as_dict()
        result["seconds"] = time.time() - started
        failed = None
        if rank_zero_only.rank == 0:
            path = self.folder.summary
            summary = json.loads(path.read_text()) if path.is_file() else {}
            try:
                replace_text(path, json.dumps(summary | {when: result}, indent=1))
            except OSError as error:
                failed = error
        raise_on_all(failed)


def refuse_tokenizer(tokenizer: Any, policy: PreTrainedModel, config: RLConfig) -> None:
    """Raises unless the tokenizer turns the first prompt into ids that the policy can take.

    Args:
        tokenizer: of the policy's folder.
        policy: causal LM.
        config: gives the task and the longest rollout.

    Raises:
        ValueError: no ids, an id beyond the vocabulary, or more positions than the model has.
    """
    problem = config.task.problem("train", 0)
    ids = prompt_ids(tokenizer, problem)
    size = policy.get_input_embeddings().num_embeddings
    if not ids or max(ids) >= size:
        raise ValueError(
            f"policy: expected a tokenizer whose ids are below {size}, its tokenizer makes "
            f"{ids[:8]} of the prompt {problem.prompt!r:.40}; is it saved in the model's folder?"
        )
    positions = getattr(policy.config, "max_position_embeddings", None)
    longest = len(ids) + config.rollout.max_tokens
    if positions is not None and longest > positions:
        raise ValueError(
            f"rollout.max_tokens: prompt and rollout take {longest} positions, the model has "
            f"{positions}"
        )


def check_policy_folder(path: str, name: str = "policy") -> None:
    """Raises unless a folder can hold a transformers model.

    Args:
        path: the folder.
        name: of the option, for errors.

    Raises:
        ValueError: there is no such folder, or no config.json in it.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{name}.path: {path} is no model folder (no config.json in it)")


def load_policy(
    config: PolicyConfig, task: Task, name: str = "policy"
) -> tuple[PreTrainedModel, Any]:
    """The policy in fp32 and its tokenizer.

    Args:
        config: a folder, or the warm-up that makes one.
        task: gives the warm-up's documents.
        name: of the option, for errors.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: the folder holds no causal LM or no tokenizer, or the task has no documents.
    """
    if config.warmup is not None:
        if not hasattr(task, "document"):
            raise ValueError(f"{name}.warmup: {type(task).__name__} has no documents to learn from")
        try:
            path = warm_up(task, config.warmup, [progress_display("warm-up")])
        except OSError as error:
            raise ValueError(f"{name}.warmup.cache_dir: cannot use it: {error}") from error
    else:
        path = Path(config.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        why = textwrap.shorten(str(error), 240)  # it may go on about pip and GitHub
        raise ValueError(f"{name}.path: cannot load {path}: {why}") from error
    return model, tokenizer


def load_teacher(
    config: PolicyConfig, task: Task, policy: PreTrainedModel, tokenizer: Any
) -> PreTrainedModel:
    """The teacher in fp32.

    Args:
        config: a folder, or the warm-up that makes one.
        task: gives the warm-up's documents.
        policy: causal LM that will follow it.
        tokenizer: of the policy.

    Returns:
        The model.

    Raises:
        ValueError: it cannot be loaded, or its tokens are not the policy's.
    """
    teacher, own = load_policy(config, task, "teacher")
    sizes = [m.get_input_embeddings().num_embeddings for m in (policy, teacher)]
    if sizes[0] != sizes[1] or own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher: expected the policy's tokens, {len(tokenizer.get_vocab())} in a vocabulary "
            f"of {sizes[0]}, got others: {len(own.get_vocab())} in {sizes[1]}"
        )
    return teacher


def updates_of(path: Path) -> int:
    """Updates that a checkpoint holds.

    Args:
        path: a Lightning checkpoint.

    Returns:
        The count.

    Raises:
        ValueError: it was not written by trimtab-rl.
    """
    checkpoint = torch.load(path, map_location="meta", weights_only=True)
    if "trimtab" not in checkpoint:
        raise ValueError(f"resume: {path} was not written by trimtab-rl")
    return checkpoint["trimtab"]["updates_done"]


def check_checkpoint(path: Path, module: RLModule) -> None:
    """Raises unless a checkpoint fits the module.

    Args:
        path: a checkpoint of ours.
        module: as configured.

    Raises:
        ValueError: a weight is missing, unknown or of another shape, or the adapters that it holds
            were trained on another base.
    """
    own = module.stored_weights()
    checkpoint = torch.load(path, map_location="meta", weights_only=True)
    stored = checkpoint["state_dict"]
    for name in sorted(own.keys() | stored.keys()):
        expected = tuple(own[name].shape) if name in own else "no such weight"
        found = tuple(stored[name].shape) if name in stored else "nothing"
        if expected != found:
            raise ValueError(
                f"resume: {path} does not fit: {name}: expected {expected}, got {found}"
            )
    module.refuse_base(checkpoint)
