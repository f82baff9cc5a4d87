"""Validation loss of AdamW, the authors' Adam-mini and ours, on text that every machine has.

    pip install adam-mini==1.1.1 --no-deps
    python benchmarks/curves.py self-check
    python benchmarks/curves.py run      # 96 runs of about 95 s on one core; may be restarted
    python benchmarks/curves.py report

Model: Llama of 9.6M parameters over bytes (transformers), fp32 weights, forward and backward under
bf16 autocast, gradients clipped at norm 1. Text: the sources of Python's standard library, files
split into training and validation by a hash of their names. Per seed, every arm starts from the
same weights and sees the same batches of 4 x 256 bytes in the same order.
Rate: 20 steps of warm-up, constant, then linear to 0 over the last fifth. The run of 120 steps is
a branch of the run of 240: at step 96 model and optimizer are copied, decayed and evaluated, then
put back exactly (`self-check` compares the bits), and the constant phase goes on.
Loss: mean over 61,440 fixed validation bytes, in nats per byte, under the same autocast.
All arms: betas (0.9, 0.95), eps 1e-8, weight decay 0.1 on matrices, none on norms (the authors'
package takes named parameters and makes the same exception by name: "norm").

`run` gives each run a fresh process and writes a line to results/optimizer_curves.jsonl when it is
done; runs that are there already are skipped. `report` writes results/optimizer_curves.png and
prints the tables.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROWS = RESULTS / "optimizer_curves.jsonl"

SHORT, LONG, WARMUP = 120, 240, 20
BATCH, LENGTH, VALIDATION = 4, 256, 240  # sequences a step; bytes; validation sequences
LRS = (1.5e-4, 3e-4, 6e-4, 1.2e-3)
SEEDS = (0, 1, 2)
FIRST = ("adamw", "authors", "rows", "paper")
ARMS = (*FIRST, "snr", "rows-bf16m", "paper-bf16m", "snr-bf16m")
NOT_CONSTRUCTIBLE = 3  # exit status of a run whose optimizer this checkout cannot make


class Run(NamedTuple):
    """What tells one run from another."""

    arm: str
    seed: int
    lr: float


class Text(NamedTuple):
    """The corpus: training and validation bytes, and a hash of both."""

    train: Tensor
    validation: Tensor
    sha256: str


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=Path, default=ROWS)
        command.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
        command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
        command.add_argument("--lrs", type=float, nargs="+", default=LRS)
        if name == "run":
            command.add_argument("--limit", type=int, help="stop after so many runs")
            command.add_argument("--patience", type=float, default=180, help="minutes to wait for "
                                 "arms that cannot be made yet")  # fmt: skip
    one = commands.add_parser("one", help="one run in this process; its row goes to stdout")
    one.add_argument("--arm", choices=ARMS, required=True)
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--lr", type=float, required=True)
    commands.add_parser("self-check").add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "run":
        run_queue(args)
    elif args.command == "one":
        print(json.dumps(train_run(Run(args.arm, args.seed, args.lr))))
    elif args.command == "self-check":
        self_check(args.arms)
    else:
        report(args)


# The queue


def run_queue(args: argparse.Namespace) -> None:
    """Runs what is missing, each in a process of its own, and appends the rows."""
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    finished = {Run(r["arm"], r["seed"], r["lr"]) for r in read_rows(args.rows)}
    todo = deque(run for run in queue_order(args) if run not in finished)
    print(f"{len(finished)} finished, {len(todo)} to do", flush=True)
    done, refused_in_a_row, waiting_since = 0, 0, time.monotonic()
    failures: dict[Run, int] = {}
    while todo and (args.limit is None or done < args.limit):
        run = todo.popleft()
        row, status = spawn(run)
        if row is not None:
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done, refused_in_a_row, waiting_since = done + 1, 0, time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {run} {row['val_loss']} "
                  f"{row['wall_seconds']:.0f} s, {len(todo)} to do", flush=True)  # fmt: skip
            continue
        failures[run] = failures.get(run, 0) + (status != NOT_CONSTRUCTIBLE)
        print(f"{time.strftime('%H:%M:%S')} {run} put off, exit status {status}", flush=True)
        if failures[run] >= 5:
            print(f"{run} given up", flush=True)
            continue
        todo.append(run)
        refused_in_a_row += 1
        if refused_in_a_row >= len(todo):
            if time.monotonic() - waiting_since > 60 * args.patience:
                print("patience is over", flush=True)
                return
            time.sleep(60)
            refused_in_a_row = 0


def queue_order(args: argparse.Namespace) -> Iterator[Run]:
    """The runs asked for: the four first arms together, then one arm after another."""
    for arms in (FIRST, *((arm,) for arm in ARMS[len(FIRST) :])):
        for seed, lr, arm in product(args.seeds, args.lrs, arms):
            if arm in args.arms:
                yield Run(arm, seed, lr)


def spawn(run: Run) -> tuple[dict | None, int]:
    """The row of a run in a fresh process and its exit status; a failure is tried once more."""
    command = [sys.executable, __file__, "one", "--arm", run.arm]
    command += ["--seed", str(run.seed), "--lr", str(run.lr)]
    status = 0
    for attempt in range(2):
        if attempt:
            time.sleep(20)
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        status = result.returncode
        if status == 0:
            return json.loads(result.stdout.splitlines()[-1]), status
        if status == NOT_CONSTRUCTIBLE:
            break
    return None, status


# One run


def train_run(run: Run) -> dict:
    """Both lengths of one run, as a row."""
    started = time.time()
    commit = describe_checkout()  # before the run: the checkout may change under it
    text = read_text()
    model = build_model(run.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    try:
        optimizer = build_optimizer(run.arm, model, run.lr)
    except (TypeError, ValueError) as error:
        print(f"{run.arm}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(NOT_CONSTRUCTIBLE)
    batches = sample_batches(text.train, run.seed, LONG)
    validation = validation_batches(text.validation)

    losses = train(model, optimizer, batches, run.lr, range(0, decay_start(SHORT)), LONG)
    saved = snapshot(model, optimizer)
    branch = train(model, optimizer, batches, run.lr, range(decay_start(SHORT), SHORT), SHORT)
    val_short = evaluate(model, validation)
    restore(model, optimizer, saved)
    rest = train(model, optimizer, batches, run.lr, range(decay_start(SHORT), LONG), LONG)
    val_long = evaluate(model, validation)
    state_bytes = optimizer_bytes(optimizer)
    return {
        **run._asdict(),
        "val_loss": {str(SHORT): val_short, str(LONG): val_long},
        "train_loss": {str(SHORT): thin(losses + branch), str(LONG): thin(losses + rest)},
        "state_bytes": state_bytes,
        "state_bytes_per_parameter": state_bytes / n_parameters,
        "parameters": n_parameters,
        "wall_seconds": time.time() - started,
        "threads": torch.get_num_threads(),
        "corpus_sha256": text.sha256,
        "corpus_bytes": {"train": len(text.train), "validation": len(text.validation)},
        "device": f"CPU, 1 thread of {os.cpu_count()} cores, {cpu_name()}",
        "versions": versions(),
        **commit,
    }


def build_model(seed: int, layers: int = 6, hidden: int = 384, ffn: int = 1024) -> nn.Module:
    """The Llama over bytes, its weights from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=ffn,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def build_optimizer(arm: str, model: nn.Module, lr: float) -> Optimizer:
    """The optimizer an arm stands for; TypeError or ValueError where it cannot be made."""
    settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if arm == "adamw":
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2]},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, fused=True, **settings)
    if arm == "authors":
        from adam_mini import Adam_mini

        config = model.config
        geometry = {
            "dim": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads,
        }
        return Adam_mini(list(model.named_parameters()), verbose=False, **geometry, **settings)
    from trimtab.optim import AdamMini

    preset, _, momentum = arm.partition("-")
    if momentum:
        settings["momentum_dtype"] = torch.bfloat16
    return AdamMini.for_model(model, preset=preset, **settings)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Tensor,
    lr: float,
    steps: range,
    total: int,
) -> list[float]:
    """Takes `steps` of a schedule of `total` steps; the loss of each before its update."""
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step, total)
        loss = mean_loss(model, batches[step])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mean_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Nats per byte of `sequences` [B, T + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Tensor) -> float:
    """Nats per byte over all validation batches [N, B, T + 1]."""
    return sum(mean_loss(model, batch).item() for batch in batches) / len(batches)


def rate_factor(step: int, total: int) -> float:
    """The learning rate of step 0, 1, ... as a fraction of its peak."""
    start = decay_start(total)
    return min(1.0, (step + 1) / WARMUP, (total - step) / (total - start))


def decay_start(total: int) -> int:
    """The first step of the decay: the last fifth."""
    return total * 4 // 5


def snapshot(model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict]:
    """A copy of everything the next step reads."""
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def restore(model: nn.Module, optimizer: Optimizer, saved: tuple[dict, dict]) -> None:
    """Puts a snapshot back; it must not be used again."""
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])


def self_check(arms: list[str]) -> None:
    """Per arm, a small model: is training with a branch bit-identical to training without?"""
    batches = sample_batches(read_text().train, 0, 10)
    for arm in arms:
        finals = []
        for branching in (False, True):
            model = build_model(0, layers=2, hidden=96, ffn=160)
            try:
                optimizer = build_optimizer(arm, model, 1e-3)
            except (TypeError, ValueError) as error:
                print(f"{arm}: not constructible, {error}")
                break
            losses = train(model, optimizer, batches, 1e-3, range(0, 5), 10)
            if branching:
                saved = snapshot(model, optimizer)
                train(model, optimizer, batches, 1e-3, range(4, 6), 6)
                restore(model, optimizer, saved)
            losses += train(model, optimizer, batches, 1e-3, range(5, 10), 10)
            moments = [t for state in optimizer.state.values() for t in state.values()]
            finals.append([*model.parameters(), *filter(torch.is_tensor, moments)])
        else:
            same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*finals))
            print(f"{arm}: {'identical' if same else 'DIFFERENT'}, {len(finals[0])} tensors, "
                  f"loss {losses[0]:.3f} to {losses[-1]:.3f}")  # fmt: skip


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() * v.element_size() for v in values if torch.is_tensor(v))


def thin(losses: list[float]) -> list[float]:
    """The mean of every ten steps, to four decimals."""
    return [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)]


# The text


def read_text() -> Text:
    """The standard library's sources, sorted by path; every tenth file by hash validates."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idlelib", "encodings"}
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            parts[digest[0] % 10 == 0].append(path.read_bytes())
    train_bytes, validation_bytes = (b"\n".join(parts[key]) for key in (False, True))
    return Text(
        torch.frombuffer(bytearray(train_bytes), dtype=torch.uint8),
        torch.frombuffer(bytearray(validation_bytes), dtype=torch.uint8),
        hashlib.sha256(train_bytes + b"\0" + validation_bytes).hexdigest(),
    )


def sample_batches(data: Tensor, seed: int, steps: int) -> Tensor:
    """Sequences at random places, [steps, BATCH, LENGTH + 1]; the same for every arm."""
    generator = torch.Generator().manual_seed(1000 + seed)
    starts = torch.randint(len(data) - LENGTH, (steps, BATCH), generator=generator)
    return data[starts[..., None] + torch.arange(LENGTH + 1)].long()


def validation_batches(data: Tensor) -> Tensor:
    """VALIDATION sequences evenly spaced over the validation text, in batches of 8."""
    starts = torch.linspace(0, len(data) - LENGTH - 1, VALIDATION, dtype=torch.float64).long()
    return data[starts[:, None] + torch.arange(LENGTH + 1)].long().view(-1, 8, LENGTH + 1)


# Where a row comes from


def versions() -> dict[str, str | None]:
    """Of everything a loss may depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trimtab", "adam-mini"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_checkout() -> dict[str, str]:
    """The commit, marked where optim/ differs from it, and a hash of our optimizer's sources."""
    git = ["git", "-C", str(HERE.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True)
    changed = subprocess.run([*git, "status", "--porcelain", "optim"], capture_output=True)
    sources = sorted((HERE.parent / "optim").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    name = commit.stdout.decode().strip() + ("+changes" if changed.stdout else "")
    return {"commit": name, "optim_sha256": digest[:16]}


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# The report


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report(args: argparse.Namespace) -> None:
    """Tables on stdout, and the figure under results/."""
    rows = sorted(
        read_rows(args.rows), key=lambda row: (ARMS.index(row["arm"]), row["seed"], row["lr"])
    )
    rows = [
        row
        for row in rows
        if row["arm"] in args.arms and row["seed"] in args.seeds and row["lr"] in args.lrs
    ]
    if not rows:
        sys.exit(f"no rows in {args.rows}")
    for length in (SHORT, LONG):
        print("\n".join(tables(losses_by_run(rows, length), length, rows)), "\n")
    arms = {row["arm"] for row in rows}
    missing = [run for run in queue_order(args) if run.arm in arms and run not in keys(rows)]
    if missing:
        print("Incomplete, missing:", *("/".join(map(str, run)) for run in missing))
    sources = {row["arm"]: set() for row in rows}
    for row in rows:
        sources[row["arm"]].add((row["commit"], row["optim_sha256"]))
    for arm, states in sources.items():
        print(f"{arm}: code {sorted(states)}")
    draw(rows, RESULTS / "optimizer_curves.png")


def keys(rows: list[dict]) -> set[Run]:
    """The runs that have rows."""
    return {Run(row["arm"], row["seed"], row["lr"]) for row in rows}


def losses_by_run(rows: list[dict], length: int) -> dict[Run, float]:
    """Validation losses of one length."""
    return {Run(r["arm"], r["seed"], r["lr"]): r["val_loss"][str(length)] for r in rows}


def tables(losses: dict[Run, float], length: int, rows: list[dict]) -> list[str]:
    """Markdown lines: losses by arm and rate, then differences to AdamW, paired by seed."""
    arms = [arm for arm in ARMS if any(run.arm == arm for run in losses)]
    lrs = sorted({run.lr for run in losses})
    size = {row["arm"]: row["state_bytes_per_parameter"] for row in rows}
    best = {arm: best_lr(losses, arm, lrs) for arm in arms}
    lines = [f"**{length} steps**: validation loss, nats per byte, mean +- standard deviation over "
             "seeds (their number); least in bold", ""]  # fmt: skip
    lines += header("arm", "state, B/parameter", *(f"lr {lr:g}" for lr in lrs))
    for arm in arms:
        cells = [summary(by_seed(losses, arm, lr).values()) for lr in lrs]
        cells = [f"**{c}**" if lr == best[arm] else c for c, lr in zip(cells, lrs)]
        lines.append(table_line(arm, f"{size[arm]:.3f}", *cells))
    if "adamw" not in arms:
        return lines
    lines += ["", "Minus AdamW, paired by seed; the last column has each arm, AdamW too, at its "
              "own best rate of these (on the same losses)", ""]  # fmt: skip
    lines += header("arm", *(f"lr {lr:g}" for lr in lrs), "best against best")
    for arm in arms[1:]:
        pairs = [(lr, lr) for lr in lrs] + [(best[arm], best["adamw"])]
        cells = [summary(difference(losses, arm, *pair), sign="+") for pair in pairs]
        lines.append(table_line(arm, *cells[:-1], f"{cells[-1]} at {best[arm]:g}"))
    return lines


def by_seed(losses: dict[Run, float], arm: str, lr: float) -> dict[int, float]:
    """Losses of one arm at one rate."""
    return {run.seed: loss for run, loss in losses.items() if (run.arm, run.lr) == (arm, lr)}


def best_lr(losses: dict[Run, float], arm: str, lrs: list[float]) -> float:
    """The rate of least mean loss among those with the most seeds; NaN counts as infinite."""
    found = {lr: by_seed(losses, arm, lr) for lr in lrs}
    most = max(map(len, found.values()))
    means = {lr: statistics.fmean(v.values()) for lr, v in found.items() if len(v) == most}
    return min(means, key=lambda lr: math.inf if math.isnan(means[lr]) else means[lr])


def difference(losses: dict[Run, float], arm: str, lr: float, adamw_lr: float) -> list[float]:
    """The arm minus AdamW for every seed that has both."""
    ours, theirs = by_seed(losses, arm, lr), by_seed(losses, "adamw", adamw_lr)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def summary(values: Iterable[float], sign: str = "") -> str:
    """Mean +- sample standard deviation (count)."""
    values = torch.tensor(list(values), dtype=torch.float64)  # NaN where a run diverged
    if len(values) == 0:
        return "-"
    spread = f" +- {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{spread} ({len(values)})"


def header(*names: str) -> list[str]:
    """A table's first two lines."""
    return [table_line(*names), "|---" * len(names) + "|"]


def table_line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def draw(rows: list[dict], path: Path) -> None:
    """Loss against rate per arm, one panel a length; points are seeds, lines their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"adamw": "black", "authors": "tab:red", "rows": "tab:blue", "paper": "tab:orange",
               "snr": "tab:green"}  # fmt: skip
    labels = {"adamw": "AdamW", "authors": "authors' Adam-mini 1.1.1"}
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    lrs = sorted({row["lr"] for row in rows})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, length in zip(axes, (SHORT, LONG)):
        losses = losses_by_run(rows, length)
        for i, arm in enumerate(arms):
            shift = 1.012 ** (i - (len(arms) - 1) / 2)  # apart, so that arms do not hide each other
            preset, _, bf16 = arm.partition("-")
            colour = colours[preset]
            seeds = {lr: list(by_seed(losses, arm, lr).values()) for lr in lrs}
            points = [(lr * shift, loss) for lr in lrs for loss in seeds[lr]]
            axis.plot(*zip(*points), ".", color=colour, alpha=0.35, markersize=5)
            means = [(lr * shift, statistics.fmean(v)) for lr, v in seeds.items() if v]
            axis.plot(
                *zip(*means),
                linestyle="--" if bf16 else "-",
                marker="o",
                markersize=5,
                markerfacecolor="white" if bf16 else colour,
                color=colour,
                label=labels.get(arm, f"ours, {preset}" + (", bf16 momentum" if bf16 else "")),
            )
        axis.set_xscale("log")
        axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axis.minorticks_off()
        axis.set_xlabel("peak learning rate")
        axis.set_title(f"{length} steps of {BATCH * LENGTH:,} bytes")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("validation loss, nats per byte")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.suptitle("Llama of 9.6M parameters over bytes; dots: seeds, lines: their means")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
