"""A base policy from nothing: a small Llama, supervised on a task's few-shot documents.

Two phases: answers worked out only, so that the model learns to calculate; then a short mixture in
which direct answers dominate, so that it can reason but rarely does. Block matrices are trained by
Muon, the rest by AdamW: in the same minute an untuned AdamW alone reached 0.11 where this reached
0.86 (figures: shared/design/rl.md). The result is cached in the ordinary transformers format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from filelock import FileLock
from pytorch_lightning.callbacks import ProgressBar
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..triton_kernels.gem import gem_loss
from .chain_sum import Styles

logger = logging.getLogger(__name__)

IGNORED = -100  # label of tokens without loss, as cross_entropy has it


class DocumentTask(Protocol):
    """What the warm-up asks of a task (`ChainSumTask` has it)."""

    def document(self, index: int, styles: Styles) -> list[tuple[str, str]]:
        """(question, answer) texts of one supervised document."""
        ...

    def characters(self) -> str:
        """Every character a document can hold."""
        ...


@dataclass(frozen=True)
class WarmupConfig:
    """The base policy and its supervised warm-up.

    Args:
        hidden_size: width of the residual stream.
        layers: decoder layers.
        heads: attention heads; their size is hidden_size / heads.
        ffn: width of the feed-forward layer.
        vocab_size: token ids; those beyond the task's characters are unused: a tail to prune.
        reasoning_steps: steps of the first phase (answers worked out only).
        mixture_steps: steps of the second phase (`styles`).
        reasoning_styles: answer styles of the first phase.
        styles: answer styles of the second phase.
        batch_documents: documents a step.
        loss: `cross_entropy`, or `gem`, which keeps the entropy that RL explores with.
        gem_beta: of gem, in (0, 1]; 1 is cross-entropy.
        gem_h: form of gem, see `gem_loss`.
        muon_lr: learning rate of Muon (block matrices).
        adamw_lr: learning rate of AdamW (embeddings, norms).
        seed: of the weights and of the documents' order.
        cache_dir: folder that keeps finished bases, one per configuration.

    Raises:
        ValueError: a size below 1, steps below 0, gem_beta outside (0, 1], or hidden_size / heads
            is not even.
    """

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    ffn: int = 384
    vocab_size: int = 64
    reasoning_steps: int = 1000
    mixture_steps: int = 150
    reasoning_styles: Styles = Styles(worked=0.7, checked=0.3)  # noqa: RUF009 (frozen)
    styles: Styles = Styles(worked=0.2, checked=0.1)  # noqa: RUF009 (frozen)
    batch_documents: int = 6
    loss: Literal["cross_entropy", "gem"] = "cross_entropy"
    gem_beta: float = 0.7
    gem_h: Literal["linear", "logsigmoid"] = "linear"
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    seed: int = 0
    cache_dir: str = ".cache/trimtab"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "ffn", "vocab_size", "batch_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a count >= 1, got {getattr(self, name)}")
        for name in ("reasoning_steps", "mixture_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a count >= 0, got {getattr(self, name)}")
        if not 0 < self.gem_beta <= 1:
            raise ValueError(f"gem_beta: expected a temperature in (0, 1], got {self.gem_beta}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                "heads: expected hidden_size / heads to be even, "
                f"got {self.hidden_size} / {self.heads}"
            )


def character_tokenizer(characters: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per character, in the ordinary transformers format.

    Args:
        characters: the characters, each once.
        vocab_size: ids in all; unused ones are named `<unused_i>`.

    Returns:
        A tokenizer with `<pad>` = 0, `<eos>` = 1, `<bos>` = 2 that adds `<bos>` by itself.

    Raises:
        ValueError: vocab_size is too small for the characters.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    names = special + list(characters)
    if len(names) > vocab_size:
        raise ValueError(f"vocab_size: expected at least {len(names)}, got {vocab_size}")
    names += [f"<unused_{i}>" for i in range(vocab_size - len(names))]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", names.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def warm_up(task: DocumentTask, config: WarmupConfig, callbacks: list[pl.Callback]) -> Path:
    """Trains the base policy, or finds it in the cache.

    Args:
        task: gives the documents.
        config: sizes and schedule.
        callbacks: Lightning callbacks that show the progress.

    Returns:
        Folder with the model and its tokenizer; `from_pretrained` loads both.
    """
    recipe = {"version": 2, "task": repr_of(task), "warmup": dataclasses.asdict(config)}
    del recipe["warmup"]["cache_dir"]
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(config.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"base-{key}"
    with FileLock(f"{folder}.lock"):  # ranks and parallel runs wait for the one that trains
        if not folder.exists():
            started = time.time()
            model, tokenizer = _train(task, config, callbacks)
            recipe["seconds"] = round(time.time() - started, 1)
            unfinished = cache / f"{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            (unfinished / "recipe.json").write_text(json.dumps(recipe, indent=1))
            unfinished.rename(folder)
    return folder


def repr_of(task: Any) -> dict[str, Any]:
    """Class and plain settings of a task: what its documents depend on."""
    plain = {k: v for k, v in vars(task).items() if not k.startswith("_")}
    return {"class": type(task).__qualname__, **json.loads(json.dumps(plain, default=vars))}


def _train(
    task: DocumentTask, config: WarmupConfig, callbacks: list[pl.Callback]
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = character_tokenizer(task.characters(), config.vocab_size)
    batches = _Documents(task, config, tokenizer)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        callbacks=callbacks,
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # a run goes on alike whether it finds a base or makes it
        torch.manual_seed(config.seed)
        module = WarmupModule(config, tokenizer)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.model.eval(), tokenizer


class _Documents(IterableDataset):
    """Right-padded (input ids, labels) of each step; labels are shifted and cover answers only."""

    def __init__(self, task: DocumentTask, config: WarmupConfig, tokenizer: Any) -> None:
        self.task, self.config, self.tokenizer = task, config, tokenizer

    def __len__(self) -> int:
        return self.config.reasoning_steps + self.config.mixture_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        for step in range(config.reasoning_steps + config.mixture_steps):
            reasoning = step < config.reasoning_steps
            styles = config.reasoning_styles if reasoning else config.styles
            first = (config.seed * 100_000 + step) * config.batch_documents
            rows = [
                self._row(self.task.document(first + i, styles))
                for i in range(config.batch_documents)
            ]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
            labels = torch.tensor([lab + [IGNORED] * (width - len(lab)) for _, lab in rows])
            yield ids[:, :-1], labels[:, 1:]

    def _row(self, document: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids, labels = [self.tokenizer.bos_token_id], [IGNORED]
        for question, answer in document:
            q = self.tokenizer.encode(question, add_special_tokens=False)
            a = self.tokenizer.encode(answer, add_special_tokens=False)
            ids += q + a
            labels += [IGNORED] * len(q) + a
        return ids, labels


class WarmupModule(pl.LightningModule):
    """Supervised training of a fresh Llama.

    Args:
        config: sizes and schedule.
        tokenizer: gives the special ids.
    """

    def __init__(self, config: WarmupConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimizers step together
        self.warmup = config
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
            )
        )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        muon = torch.optim.Muon(
            matrices, lr=self.warmup.muon_lr, weight_decay=0.0, adjust_lr_fn="original"
        )
        return [muon, torch.optim.AdamW(rest, lr=self.warmup.adamw_lr, betas=(0.9, 0.98))]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        ids, labels = batch
        logits = self.model(ids, use_cache=False).logits
        logits, labels = logits.flatten(0, 1), labels.flatten()
        if self.warmup.loss == "gem":
            of_tokens = gem_loss(
                logits,
                labels,
                beta=self.warmup.gem_beta,
                h=self.warmup.gem_h,
                ignore_index=IGNORED,
            )
            loss = of_tokens.sum() / (labels != IGNORED).sum()
        else:
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        for optimizer, lr in zip(
            self.optimizers(), (self.warmup.muon_lr, self.warmup.adamw_lr), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = lr * self._rate(batch_index)
            optimizer.step()
        self.log("loss", loss.detach(), prog_bar=True)

    def _rate(self, step: int) -> float:
        """Linear warm-up, then linear decay 1 -> 0.15 in the first phase, 0.15 -> 0.02 after it."""
        first, second = self.warmup.reasoning_steps, self.warmup.mixture_steps
        if step < first:
            return min(1.0, (step + 1) / 30) * (1.0 - 0.85 * step / first)
        return 0.15 - 0.13 * (step - first) / second
