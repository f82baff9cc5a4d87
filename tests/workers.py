"""Functions that tests start in processes of their own (spawn needs them in a module by name).

One section per test file; a function's first argument is its rank. Processes meet by a file in
tmp_path.
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from trimtab.stability import aggregation_weights, apply_weights, mismatch_report

# test_aggregation.py


def aggregation_problem():
    """Eight rows of three groups, none of which lies on one rank alone, and a parameter."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 1, 3, 2, 5, 0, 2, 3])
    inputs = {
        "mask": torch.arange(5) < lengths[:, None],
        "ids": torch.tensor([2, 2, -7, 2, 40, -7, 2, 40]),
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, -0.5, 0.7, 2.0]),
        "features": torch.randn(8, 5, 3, generator=generator, dtype=torch.float64),
    }
    parameter = torch.randn(3, generator=generator, dtype=torch.float64)
    return inputs, parameter.requires_grad_()


def aggregation_loss(parameter, inputs):
    return -inputs["advantages"][:, None] * torch.tanh(inputs["features"] @ parameter)


def aggregation_over_ranks(rank, world, folder, rules):
    """Each rank takes some rows of the problem; rank 0 saves the sums of the gradients by rule."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    inputs, parameter = aggregation_problem()
    rows = torch.tensor([0, 1, 3]) if rank == 0 else torch.tensor([2, 4, 5, 6, 7])
    mine = {name: x[rows] for name, x in inputs.items()}
    gradients = {}
    for rule in rules:
        for zero_advantage in ("count", "exclude"):
            weights = aggregation_weights(
                mine["mask"],
                mine["ids"],
                mine["advantages"],
                rule=rule,
                max_length=10,
                zero_advantage=zero_advantage,
                process_group=dist.group.WORLD,
            )
            loss = apply_weights(aggregation_loss(parameter, mine), weights)
            (gradient,) = torch.autograd.grad(loss, parameter)
            dist.all_reduce(gradient)
            gradients[rule, zero_advantage] = gradient
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.destroy_process_group()


# test_stability_contract.py


def stability_rows(p, seed):
    """Which rows each of two ranks holds; of problem 3 the first has none."""
    first = torch.arange(len(p["mask"])) % 3 == (0 if seed < 3 else 3)
    return [first.nonzero().flatten(), (~first).nonzero().flatten()]


def stability_over_ranks(rank, world, folder):
    """Every case on this rank's rows of three problems."""
    import stability_cases as cases

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    for seed in range(4):
        p = cases.problem(seed)
        t = p["mask"].shape[1]
        mine = cases.rows_of(p, stability_rows(p, seed)[rank])
        if rank:  # this rank's padding is wider
            mine = cases.padded(mine, [t, t])
        found = {}
        for name, case in cases.CASES.items():
            outputs = {key: x.double() for key, x in case(mine, dist.group.WORLD).items()}
            if rank and outputs.get("row", torch.zeros(0)).ndim == 2:
                outputs["row"] = outputs["row"][:, :t]
            found[name] = outputs
        torch.save(found, f"{folder}/{seed}_{rank}.pt")
    p = cases.problem(0)
    if rank:
        p = {
            name: torch.full_like(x, float("nan")) if x.is_floating_point() else x
            for name, x in p.items()
        }
    refused = {}
    for name, case in cases.CASES.items():
        if name in cases.LOSSES or name in cases.OF_ROWS_ALONE:
            continue
        try:
            case(p, dist.group.WORLD)
            refused[name] = False
        except ValueError as error:
            refused[name] = "finite" in str(error) if rank else "another rank" in str(error)
    torch.save(refused, f"{folder}/refused_{rank}.pt")
    # the ranks' dtypes differ: no error, and what fp32 is good for
    p = cases.problem(0)
    if rank:
        p = {name: x.float() if x.is_floating_point() else x for name, x in p.items()}
    mine = cases.rows_of(p, stability_rows(p, 0)[rank])
    found = {}
    for name, case in cases.CASES.items():
        found[name] = {key: x.double() for key, x in case(mine, dist.group.WORLD).items()}
    torch.save(found, f"{folder}/mixed_{rank}.pt")
    other = {} if rank else {"low": 0.1}  # reports that do not go together
    report = mismatch_report(p["logp"], p["old"], p["mask"], **other)
    try:
        report.all_reduce()
    except ValueError as error:
        Path(f"{folder}/unlike_{rank}").write_text(str(error))
    dist.destroy_process_group()


# test_budget.py


def success_rates_over_ranks(rank, world, folder):
    from trimtab.rl import SuccessRates

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    store = SuccessRates()
    prompts, rewards = (["a", "b"], [1.0, 0.0]) if rank else (["a", "c", "a"], [0.0, 1.0, 1.0])
    store.observe(prompts, torch.tensor(rewards), process_group=dist.group.WORLD)
    broken = torch.tensor([float("nan") if rank else 1.0])
    try:
        store.observe(["a"], broken, process_group=dist.group.WORLD)
    except ValueError as error:
        Path(f"{folder}/refused_{rank}").write_text(str(error))
    torch.save(store.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# test_integration_lightning.py


def lightning_regression(configure, *, surge_at=None, truncated_from=None, short=False):
    """A LightningModule that logs response lengths: 10 tokens, from batch `surge_at` on 500.

    configure: makes the optimizers from the module. short: the lengths stay at 10.
    """

    from trimtab.optim import LengthTriggeredLR

    class LightningRegression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
            )
            self.register_buffer("seen", torch.tensor(0))  # batches; resumes with the weights

        def loss(self, x):
            return (self.net(x) - x[:, :2]).square().mean()

        def training_step(self, batch, batch_idx):
            surged = surge_at is not None and self.seen >= surge_at and not short
            length = 500.0 if surged else 10.0
            self.log("mean_length", length)
            if truncated_from is not None:
                self.log("truncated", float(self.seen >= truncated_from))
            scheduler = self.lr_schedulers()
            if isinstance(scheduler, LengthTriggeredLR):
                scheduler.observe(length)
            self.seen += 1
            return self.loss(batch[0])

        def configure_optimizers(self):
            return configure(self)

    return LightningRegression()


def lightning_ddp(rank, folder):
    """A DDP run of two ranks with both callbacks; rank 1's responses stay short."""
    import os

    from trimtab.integrations.lightning import AdamMiniCallback, LengthTriggeredLRCallback

    torch.set_num_threads(1)
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2"
    )  # Lightning starts no processes
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    module = lightning_regression(
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), surge_at=5, short=rank == 1
    )
    callback = LengthTriggeredLRCallback(warmup=2, ratio=2.0, smoothing=0.0)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict(max_epochs=6, strategy="ddp", accelerator="cpu", devices=2)
    options |= dict.fromkeys(quiet, False)
    trainer = pl.Trainer(**options, callbacks=[callback, AdamMiniCallback()])
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    parameters = list(module.parameters())
    zero = ZeroRedundancyOptimizer
    module = lightning_regression(lambda m: zero(m.parameters(), torch.optim.AdamW, lr=1e-2))
    try:
        pl.Trainer(**options, callbacks=[AdamMiniCallback()]).fit(module, data)
    except ValueError as error:
        refused = str(error)
    result = {
        "refused": refused,
        "detector": callback.state_dict(),
        "factor": callback.factor,
        "optimizer": type(optimizer).__name__,
        "parameters": [p.detach().clone() for p in parameters],
        "moment_shapes": [tuple(optimizer.state[p]["exp_avg_sq"].shape) for p in parameters],
    }
    torch.save(result, f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


# test_ddp.py


def cli_runs(rank, folder, port, runs):
    """Several runs of `trimtab-rl` by the two ranks of one group, as torchrun would start them.

    One after the other in one process: to import everything takes longer than a run.
    """
    import os

    from trimtab.rl.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",  # by it Lightning sees that the processes are there
    )
    for arguments in runs:
        main(arguments)
    dist.destroy_process_group()


class SaveGradients(pl.Callback):
    """Saves each rank's gradient before every optimizer step, in the run's folder."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = [p.grad for p in module.policy.parameters() if p.requires_grad]
        grads = [(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads]
        folder = Path(trainer.default_root_dir) / "gradients"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(grads), folder / f"{module.updates_done}-{trainer.global_rank}.pt")


def gradients_of(run_folder, update):
    """Gradients of one update, one per rank."""
    paths = sorted((run_folder / "gradients").glob(f"{update}-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


# survival.py, test_health.py


class PoisonSomeGradients(pl.Callback):
    """A NaN in the gradient of some updates, by their number only.

    Args:
        updates: numbers, from 0.
    """

    def __init__(self, updates: list[int] | None = None) -> None:
        self.updates = [4, 5, 9] if updates is None else updates

    def on_after_backward(self, trainer, module):
        if module.updates_done in self.updates:
            trained = (p for p in module.policy.parameters() if p.requires_grad)
            next(trained).grad.view(-1)[0] = float("nan")


class PoisonSomeSteps(PoisonSomeGradients):
    """A NaN in a weight after the steps of some updates.

    Args:
        updates: numbers, from 0.
    """

    def on_after_backward(self, trainer, module):
        pass

    def on_train_start(self, trainer, module):
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda *_: self.poison(module))

    def poison(self, module):
        if module.updates_done in self.updates:
            with torch.no_grad():
                _local(next(module.policy.parameters())).view(-1)[0] = float("nan")


class PoisonSecondRank(PoisonSomeSteps):
    """Both, on the second rank only.

    Args:
        updates: whose gradients.
        steps: updates whose steps.
    """

    def __init__(self, updates: list[int], steps: list[int]) -> None:
        super().__init__(steps)
        self.gradients = updates

    def on_after_backward(self, trainer, module):
        if dist.get_rank() == 1 and module.updates_done in self.gradients:
            _local(next(module.policy.parameters()).grad).view(-1)[0] = float("nan")

    def poison(self, module):
        if dist.get_rank() == 1:
            super().poison(module)


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# test_full_disk.py


class FillDisk(pl.Callback):
    """Fills a file system for some updates, but for a little room.

    Args:
        folder: on it.
        first: number of the first such update, from 0.
        last: of the last one; None: whoever wants room must remove folder/ballast.
        room: bytes left.
    """

    def __init__(self, folder: str, first: int, last: int | None = None, room: int = 0) -> None:
        self.ballast = Path(folder) / "ballast"
        self.first, self.last, self.room = first, last, room

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.updates_done == self.first and not (self.ballast.parent / "filled").exists():
            (self.ballast.parent / "filled").touch()
            with self.ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(max(0, file.tell() - self.room))
        if self.last is not None and module.updates_done == self.last + 1:
            self.ballast.unlink(missing_ok=True)
