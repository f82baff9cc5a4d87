import pytest
import pytorch_lightning as pl
import torch
from lightning_prefix_workers import Dense, Shared, fit, groups_of, model_of, on_two_processes
from prefix_cases import dense_gradient, relative_l2
from processes import run_ranks
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy

from trimtab.integrations.lightning_prefix import SharedPrefixMixin, _refuse_strategy
from trimtab.rl.prefix import SharedPrefix

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*max_epochs.*"
)


def truth_of(ranks):
    """Mean over the ranks of each rank's sum, trajectory by trajectory, in float64."""
    groups = [group for rank in ranks for group in groups_of(rank)]
    return sum(dense_gradient(model_of(), *group)[1] for group in groups) / len(ranks)


def trained(module, **options):
    module.rank_of_groups = 0
    return module, fit(module, **options)


# ---------------------------------------------------------------------- one process


@pytest.mark.parametrize("memory", ["keep", "recompute", "offload"])
def test_gradient_at_the_step_is_that_of_dense_training(memory):
    dense, _ = trained(Dense(model_of()), steps=3)
    shared = Shared(model_of())
    shared.shared_prefix_options = Shared.shared_prefix_options | {"prefix_memory": memory}
    trained(shared, steps=3)
    assert len(shared.gradients) == len(dense.gradients) == 3
    for ours, theirs in zip(shared.gradients, dense.gradients, strict=True):
        assert relative_l2(ours, theirs) < 1e-12
    torch.testing.assert_close(shared.scale.grad, dense.scale.grad, atol=0, rtol=1e-12)
    assert relative_l2(shared.gradients[0], truth_of([0])) < 1e-12


def test_calls_add_up_and_a_joint_loss():
    class Twice(Shared):
        def accumulate(self):
            loss = 0.0
            for prompt, responses, weights in self.groups():
                group = prompt, responses, self.loss_of(weights)
                loss += self.shared_prefix_backward([group], joint=True)
            self.loss = loss

    once, _ = trained(Shared(model_of()))
    twice, _ = trained(Twice(model_of()))
    assert relative_l2(twice.gradients[0], once.gradients[0]) < 1e-12
    assert twice.loss == pytest.approx(once.loss, rel=1e-6)  # summed in fp32


def test_metrics_reach_the_trainer():
    module, trainer = trained(Shared(model_of()))
    found = trainer.callback_metrics
    logical = sum(
        len(prompt) - 1 + len(response)
        for prompt, responses, _ in module.groups()
        for response in responses
    )
    assert found["prefix/shared"] == 1 and found["prefix/logical_tokens"] == logical
    assert found["prefix/bound"] > 1 and found["prefix/speedup"] > 0


def test_made_once_a_trainer_from_what_the_user_configures():
    class Own(Shared):
        made = 0

        def configure_shared_prefix(self):
            self.made += 1
            return SharedPrefix(self.model, min_bound=100.0)

    module, trainer = trained(Own(model_of()), steps=2)
    assert module.made == 1 and trainer.callback_metrics["prefix/shared"] == 0
    assert relative_l2(module.gradients[0], truth_of([0])) < 1e-12
    trained(module)
    assert module.made == 2


def test_automatic_optimization_is_refused():
    module = Shared(model_of())
    module.automatic_optimization = True
    module.training_step = lambda *_: module.accumulate()
    with pytest.raises(RuntimeError, match=r"automatic_optimization = False; .* would be lost"):
        trained(module)


def test_a_missing_model_is_named():
    class Policy(SharedPrefixMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.policy = model_of()

        def training_step(self, batch, index):
            self.shared_prefix_backward([])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    with pytest.raises(AttributeError, match="no attribute 'model'"):
        fit(Policy())


def test_an_exception_leaves_gradients_and_a_later_call_works():
    class Failing(Shared):
        def accumulate(self):
            def fails(out, wave):
                if len(self.calls) == 1:  # a wave of the second group
                    raise ZeroDivisionError
                self.calls.append(wave)
                return out.logp.sum() * self.scale

            super().accumulate()
            before = [p.grad.clone() for p in self.parameters()]
            for joint in (False, True):
                self.calls = []
                groups = [(prompt, responses[:1], fails) for prompt, responses, _ in self.groups()]
                with pytest.raises(ZeroDivisionError):
                    self.shared_prefix_backward(groups, joint=joint)
                assert all(torch.equal(p.grad, g) for p, g in zip(self.parameters(), before))
            self.zero_grad()
            super().accumulate()

    module, _ = trained(Failing(model_of()))
    assert relative_l2(module.gradients[0], truth_of([0])) < 1e-12


def test_statistics_in_validation():
    class Validated(Shared):
        def validation_step(self, batch, index):
            self.found = [
                self.shared_prefix_statistics(prompt, responses)
                for prompt, responses, _ in self.groups()
            ]

        def val_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(1))

    module = Validated(model_of())
    module.rank_of_groups = 0
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    pl.Trainer(accelerator="cpu", **dict.fromkeys(quiet, False)).validate(module, verbose=False)
    for out, (prompt, responses, _) in zip(module.found, module.groups(), strict=True):
        for row, response in zip(out.logp, responses, strict=True):
            logits = module.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(row[: len(response)], logp, atol=1e-12, rtol=0)
            assert not row[len(response) :].any()


# ---------------------------------------------------------------------- precision


def error_of(kind, **options):
    module, _ = trained(kind(model_of(torch.float32)), steps=1, **options)
    return relative_l2(module.gradients[0], truth_of([0]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_no_worse_than_dense(precision):
    """Also that a scaler's factor is on the gradient once: it is divided out before the step."""

    def plugin():  # by the Trainer's flag, fp16 on a CPU becomes bf16
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if precision == "16-mixed" else None
        return MixedPrecision(precision, "cpu", scaler)

    dense, shared = (error_of(kind, plugins=[plugin()]) for kind in (Dense, Shared))
    assert 1e-4 < shared < 1.25 * dense  # in low precision, both


def test_double_precision_of_the_trainer():
    module, _ = trained(Shared(model_of(torch.float32)), precision="64-true")
    assert module.gradients[0].dtype == torch.float64
    # the norms of a float64 model of transformers compute in fp32
    assert relative_l2(module.gradients[0], truth_of([0])) < 1e-5


# ---------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning_prefix")
    run_ranks(on_two_processes, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["Shared", "Joint", "Idle"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_take_the_gradient_of_one(ranks, strategy, kind):
    first, second = (found[strategy, kind] for found in ranks)
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "ranks disagree"
    truth = truth_of([0]) / 2 if kind == "Idle" else truth_of([0, 1])
    assert relative_l2(first[0], truth) < 1e-12
    if kind != "Idle":
        assert relative_l2(first[1], ranks[0]["ddp", "Dense"][1]) < 1e-12


def test_a_parameter_that_is_not_the_models_is_averaged_too(ranks):
    for kind in ("Shared", "Dense"):
        first, second = (found["ddp", kind, "scale"] for found in ranks)
        assert torch.equal(first, second)
    ours, theirs = (ranks[0]["ddp", kind, "scale"] for kind in ("Shared", "Dense"))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-12)


def test_metrics_of_a_sharded_model(ranks):
    assert all(found["fsdp2", "Shared", "metrics"]["prefix/shared"] == 1 for found in ranks)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_are_not_exact_are_refused(strategy):
    with pytest.raises(ValueError, match=f"found {strategy.__name__}"):
        _refuse_strategy(strategy.__new__(strategy))  # they want a GPU, and DeepSpeed itself


def test_a_static_graph_is_refused(ranks):
    assert all("expected DDP without static_graph" in found["static_graph"] for found in ranks)


# Edits to integrations/lightning_prefix.py that must turn this file red:
#   1. shared_prefix_backward: by=Tensor.backward              (no scaler)
#   2. shared_prefix_backward: without block_backward_sync     (DDP averages each wave)
#   3. shared_prefix_backward: no idle_group                   (hangs)
#   4. _average_gradients: step.all_reduce_gradients()         (the module's other parameters)
#   5. shared_prefix_backward: no restoring on an exception
