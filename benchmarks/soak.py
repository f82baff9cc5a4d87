"""A real run under faults for some minutes: nothing may be lost, and every number is a twin's.

    python benchmarks/soak.py --minutes 30

For some minutes a supervisor disturbs a run at random (seeded): it kills the trainer, at any
time, while it starts, and half-way through a checkpoint, interrupts it, fills its disk, and has its
rollout engine raise, once (which the run outlives) and twice (which stops it). Each time it resumes
the run. Meanwhile reward functions hang, crash, flood and fork, and gradients and weights become
NaN: these change the data, so they depend on texts and update numbers only.

Then the run is finished, and a twin of the same configuration runs undisturbed to the same update.
Checked are: every update once in metrics.jsonl; metrics, evaluations and weights equal to the
twin's bit for bit; no process and no unfinished file left. Transcripts may have gaps: a full disk
costs some, as it may. The disk is a small file system where one can be mounted (root); elsewhere
the trainer's files may not grow any more for a while.

Writes counts of faults injected and survived, and the memory of the trainer, as JSON. Exit code 1
if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from soak_rewards import REWARD_FAULTS

HERE = Path(__file__).resolve().parent
ENDLESS = 10**6
RECIPE: dict[str, Any] = {
    "task": {
        "class_path": "trimtab.rl.tasks.JsonLinesTask",
        "init_args": {"path": "prompts.jsonl", "reward": "soak_rewards:digits", "stop": ";"},
    },
    "policy": {"path": "policy"},
    "threads": 1,
    "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 24, "reward_timeout": 5.0},
    "update": {"lr": 1e-4, "pruning": {"rho": 0.01}, "trust_region": {}, "length_rate": {}},
    "evaluation": {"problems": 4, "samples": 2},
    "record": {"checkpoint_every": 5, "transcripts_every": 5},
    "health": {"nonfinite": "rollback"},
    "trainer": {"accelerator": "cpu", "devices": 1},
}
KILLED, STOPPED, INTERRUPTED, FINISHED = -signal.SIGKILL, 3, 130, 0


class Failure(Exception):
    """Something was lost, or did not end as it must."""


class Run:
    """A run in a folder of its own, in which it is started again and again.

    Args:
        folder: its current directory; the run's folder is `run` in it.
        seed: of the run and of the faults in its data.
        mark: in the environment of all its processes.
    """

    def __init__(self, folder: Path, seed: int, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self.control, self.log = folder / "control", folder.parent / f"{folder.name}.log"
        self.control.mkdir()
        faults = {"class_path": "soak_faults.Faults", "init_args": {"seed": seed}}
        recipe = RECIPE | {"seed": seed, "trainer": RECIPE["trainer"] | {"callbacks": [faults]}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        lines = [
            json.dumps({"prompt": f"{i % 10}ab{i * 7 % 10}c{i // 70 % 10}"}) for i in range(700)
        ]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        make_policy(folder / "policy", seed)
        self.starts = 0
        self.memory: list[int] = []  # KiB, of the running trainer

    @property
    def path(self) -> Path:
        return self.folder / "run"

    def start(self, updates: int = ENDLESS) -> subprocess.Popen[bytes]:
        """The trainer: a new run the first time, then its continuation."""
        there = (self.path / "config.yaml").is_file()
        where = ["--resume", "run"] if there else ["--config", "recipe.yaml", "--run_dir", "run"]
        self.starts += 1
        paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "TRIMTAB_SOAK": self.mark,
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "trimtab.rl", *where, "--updates", str(updates)],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, without the times."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").open()]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Notes the trainer's memory, once it trains."""
        if not self.size():
            return
        with contextlib.suppress(OSError, IndexError, ValueError):
            text = Path(f"/proc/{process.pid}/status").read_text()
            self.memory.append(int(text.split("VmRSS:")[1].split()[0]))

    def wait(self, process: subprocess.Popen[bytes], expected: int, seconds: float) -> None:
        """Until the trainer ends, as it must."""
        deadline = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise Failure(
                    f"the trainer goes on after {seconds:g} s, expected an end ({expected})"
                )
            self.watch(process)
            time.sleep(0.1)
        if process.returncode != expected:
            tail = self.log.read_bytes()[-2000:].decode(errors="replace")
            raise Failure(
                f"the trainer ended by {process.returncode}, expected {expected}:\n{tail}"
            )


def make_policy(folder: Path, seed: int) -> None:
    """A random small Llama over characters, in the transformers format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.rl.warmup import character_tokenizer

    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    ends = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)).save_pretrained(folder)
    character_tokenizer("0123456789abcdef;", 32).save_pretrained(folder)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 256 MB in `folder`, if one can be mounted; yields whether."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full_disk(run: Run, process: subprocess.Popen[bytes], mounted: bool) -> Iterator[None]:
    """No room in the run's folder until the block ends."""
    if not mounted:
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (run.size(), hard))
        yield
        return
    ballast = run.folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for block in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(block))
    try:
        yield
    finally:
        ballast.unlink()


FAULTS = (
    "kill",
    "kill within a checkpoint",
    "full disk",
    "engine raises once",
    "engine raises twice",
    "interrupt",
    "kill while it starts",
)


def disturb(run: Run, seconds: float, chance: random.Random, mounted: bool) -> Counter[str]:
    """Starts the run, disturbs it, resumes it, for so many seconds; counts what it survived."""
    survived: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    process = None
    queue: list[str] = []
    while time.monotonic() < deadline:
        if not queue:  # each kind as often, in another order each time
            queue = chance.sample(FAULTS, len(FAULTS))
        if process is None:
            process, before = run.start(), run.size()
            if queue[0] == "kill while it starts" and run.size():
                time.sleep(chance.uniform(0, 8))
            else:
                wait_for_updates(run, process, before)
        fault = queue.pop(0)
        time.sleep(chance.uniform(0, 6))
        if process.poll() is not None:
            run.wait(process, STOPPED, 0)  # says how it ended
            raise Failure("the trainer stopped by itself")
        print(f"{len(run.memory):6d}  {fault}", flush=True)
        if fault == "engine raises once":
            (run.control / "engine").write_text("1")
            until_gone(run, process, run.control / "engine")
            wait_for_updates(run, process, run.size())
            survived[fault] += 1
            continue
        if fault.startswith("kill within"):
            (run.control / "checkpoint").write_text(str(chance.randrange(0, 60)))
            run.wait(process, KILLED, 120)
        elif fault == "full disk":
            with full_disk(run, process, mounted):
                run.wait(process, STOPPED, 120)
        elif fault == "engine raises twice":
            (run.control / "engine").write_text("2")
            run.wait(process, STOPPED, 120)
        elif fault == "interrupt":
            process.send_signal(signal.SIGINT)
            run.wait(process, INTERRUPTED, 60)
        else:
            process.kill()
            run.wait(process, KILLED, 60)
        survived[fault] += 1
        process = None
    if process is not None:
        process.kill()
        process.wait()
    return survived


def wait_for_updates(run: Run, process: subprocess.Popen[bytes], before: int) -> None:
    """Until metrics.jsonl has another size: a resumed run drops lines, then adds some."""
    deadline = time.monotonic() + 300
    while run.size() == before:
        if process.poll() is not None:
            run.wait(process, FINISHED, 0)
        if time.monotonic() > deadline:
            raise Failure("no update within 300 s")
        run.watch(process)
        time.sleep(0.05)


def until_gone(run: Run, process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + 120
    while path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f"{path.name} was not met")
        run.watch(process)
        time.sleep(0.05)


def differences(run: Run, twin: Run, updates: int) -> list[str]:
    """What was lost or is another."""
    found = []
    rows, expected = run.rows(), twin.rows()
    for name, own in (("run", rows), ("twin", expected)):
        if [row["update"] for row in own] != list(range(1, updates + 1)):
            found.append(f"{name}: metrics.jsonl does not have each of {updates} updates once")
    other = [a["update"] for a, b in zip(rows, expected) if a != b]
    if other:
        found.append(f"metrics differ from the twin's at update {other[0]} and {len(other)} in all")
    weights, wanted = (load_file(r.path / "policy" / "model.safetensors") for r in (run, twin))
    found += [f"{name} differs" for name in wanted if not wanted[name].equal(weights[name])]
    ends = [json.loads((r.path / "summary.json").read_text()) for r in (run, twin)]
    for end in ends:
        end.pop("seconds")
        for when in ("before", "after"):
            end[when].pop("seconds")
    if ends[0] != ends[1]:
        found.append(f"summary: {ends[0]}, the twin's: {ends[1]}")
    litter = [str(p) for r in (run, twin) for p in r.path.rglob(".*unfinished*")]
    return found + [f"left: {path}" for path in litter]


def processes_left(mark: str) -> list[int]:
    """Processes of the runs that outlive them: all carry the mark in their environment."""
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TRIMTAB_SOAK={mark}".encode() in (folder / "environ").read_bytes():
                left.append(int(folder.name))
    return left


def soak(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the disturbed run and its twin.

    Args:
        minutes: of the disturbed part; the end of the run and its twin come on top.
        seed: of everything random.
        folder: for both; empty.

    Returns:
        What happened, for JSON; `problems` is empty if nothing was lost.
    """
    started, mark = time.monotonic(), uuid.uuid4().hex
    result: dict[str, Any] = {"minutes_asked": minutes, "seed": seed, "problems": []}
    with small_disk(folder / "disturbed") as mounted:
        run = Run(folder / "disturbed", seed, mark)
        (folder / "twin").mkdir()
        twin = Run(folder / "twin", seed, mark)
        try:
            survived = disturb(run, minutes * 60, random.Random(seed), mounted)
            result["survived"] = dict(sorted(survived.items()))
            for path in ("engine", "checkpoint"):
                (run.control / path).unlink(missing_ok=True)
            # undisturbed for a while, too: so long must the twin's memory be watched
            updates = max(max(row["update"] for row in run.rows()) + 5, int(36 * minutes))
            for each in (run, twin):
                print(f"{each.folder.name}: to update {updates}", flush=True)
                each.wait(each.start(updates), FINISHED, 3600)
            result["updates"] = updates
            result["problems"] += differences(run, twin, updates)
        except Failure as failure:
            result["problems"].append(str(failure))
        time.sleep(2.0)  # a reward's supervisor sees that its trainer was killed
        left = processes_left(mark)
        result["problems"] += [f"process {pid} is left" for pid in left]
        rows = twin.rows() if twin.size() else []
        last = rows[-1] if rows else {}
        result |= {
            "starts": run.starts,
            "full_disk_by": "tmpfs" if mounted else "RLIMIT_FSIZE",
            "in_the_data": {
                "rollbacks": last.get("health/rollbacks"),
                "rewards_lost": sum(row["reward_errors"] for row in rows),
                "rewards_timed_out": sum(row["reward_timeouts"] for row in rows),
                "twin_reward_faults": {
                    fault: path.stat().st_size
                    for fault in REWARD_FAULTS
                    if (path := twin.control / f"reward: {fault}").is_file()
                },
            },
            "twin_memory_mb": _memory(twin.memory),
            "disturbed_memory_mb_max": max(run.memory, default=0) // 1024,
            "log_mb": {
                r.folder.name: round(r.log.stat().st_size / 1e6, 2)
                for r in (run, twin)
                if r.log.is_file()
            },
        }
        if result["problems"]:
            shutil.copytree(run.path, folder / "disturbed-run", dirs_exist_ok=True)
    result["minutes"] = round((time.monotonic() - started) / 60, 2)
    return result


def _memory(kib: list[int]) -> dict[str, int]:
    """Medians over a tenth of the samples: after a fifth of the time, at the end; and the most."""
    if not kib:
        return {}
    tenth = max(1, len(kib) // 10)
    parts = {"early": kib[2 * tenth : 3 * tenth] or kib, "end": kib[-tenth:]}
    return {name: sorted(part)[len(part) // 2] // 1024 for name, part in parts.items()} | {
        "max": max(kib) // 1024
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="under faults; about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; default: printed only")
    parser.add_argument("--keep", type=Path, help="empty folder for the runs, which stay there")
    asked = parser.parse_args()
    if not asked.minutes > 0:
        parser.error(f"--minutes: expected a number > 0, got {asked.minutes}")
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="trimtab-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    result = soak(asked.minutes, asked.seed, folder.resolve())
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")
    if result["problems"]:
        print(f"the runs and their logs are in {folder}", file=sys.stderr)
        raise SystemExit(1)
    if asked.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
