"""Checks that test_integration_megatron_loss.py runs in processes of their own, on a CPU.

The first world is one process; it also writes what PyTorch makes of the whole batch at once, by
log_softmax and autograd in float64 without Megatron's schedule. Each rank of the other worlds loads
its part of that model and compares its part of the gradients.
"""

from pathlib import Path
from types import SimpleNamespace

import megatron_prefix_workers as prefix_workers
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron_prefix_workers import V, assert_same, take_gradients

from trimtab.integrations.megatron import (
    MegatronMonitors,
    MegatronSharedPrefix,
    length_triggered,
    policy_loss_function,
)
from trimtab.stability import (
    ClipEntropyMonitor,
    GradientNormMonitor,
    MismatchMonitor,
    SignLengthMonitor,
    StabilityWatch,
    VarianceMonitor,
    aggregation_weights,
    clip_metrics,
    entropy_metrics,
    gradient_variance_proxy,
    mismatch_report,
    ratio_policy_loss,
    sign_length_metrics,
)
from trimtab.triton_kernels.token_stats import TokenStats

REAL = 61  # of V entries, the rest is padding
B, T, ROWS = 8, 12, 2  # responses, tokens, rows of a micro-batch
PRUNED = {"temperature": 0.7, "prune": 0.05}
FOLDER = Path()


def make_model(**options):
    return prefix_workers.make_model(num_layers=2, **options)


def make_batch(seed=3):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(REAL, (B, T + 1), generator=generator)
    start = torch.tensor([2, 3, 1, 0, 4, T, 5, 2])  # a row without a token
    end = torch.tensor([9, T, 7, 3, 8, T, T, 10])
    mask = (torch.arange(T) >= start[:, None]) & (torch.arange(T) < end[:, None])
    group_ids = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2])
    outcome = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    return SimpleNamespace(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        mask=mask,
        group_ids=group_ids,
        outcome=outcome,
        advantages=outcome[:, None] + 0.1 * normal(B, T),
        rollout_logp=-4 + 0.3 * normal(B, T),
        weights=aggregation_weights(mask, group_ids, outcome, rule="balanced").double(),
    )


def rows_of(batch, rows):
    return SimpleNamespace(**{name: x[rows] for name, x in vars(batch).items()})


def objective(stats, batch, weights):
    loss = ratio_policy_loss(stats.logp, batch.rollout_logp, batch.advantages, mask=batch.mask)
    return (weights * (loss - 0.01 * stats.entropy + 0.1 * stats.sum_p2)).sum()


def recorded(stats, batch):
    """What the monitors are given."""
    return {
        "advantages": batch.advantages,
        "log_ratio": stats.logp.detach() - batch.rollout_logp,
        "rollout_logp": batch.rollout_logp,
        "weights": batch.weights,
        "outcome_advantages": batch.outcome,
        "group_ids": batch.group_ids,
    }


# One process, PyTorch alone


def plain_statistics(logits, batch, temperature=1.0, prune=None):
    x = logits / temperature
    if prune is not None:
        p = x.softmax(-1)
        outside = p < prune * p.amax(-1, keepdim=True)
        x = x.masked_fill(outside.scatter(-1, batch.labels[..., None], False), -torch.inf)
    log_q = x.log_softmax(-1)
    q = log_q.exp()
    found = {
        "logp": log_q.gather(-1, batch.labels[..., None])[..., 0],
        "entropy": -(q * log_q.masked_fill(q == 0, 0)).sum(-1),
        "sum_p2": q.square().sum(-1),
    }
    return SimpleNamespace(**{k: x.masked_fill(~batch.mask, 0) for k, x in found.items()})


def call(model, batch, **options):
    positions = torch.arange(T).expand(len(batch.tokens), T)
    return model(batch.tokens, positions, None, **options)


def plain_step(model, batch, real, weights, **options):
    stats = plain_statistics(call(model, batch)[..., :real], batch, **options)
    value = objective(stats, batch, weights)
    value.backward()
    return {
        "loss": value.item(),
        "stats": {name: x.detach() for name, x in vars(stats).items()},
        "gradients": take_gradients(model),
    }


def write_reference():
    """What each case of `CASES`, and three steps of training, come to."""
    batch, model = make_batch(), make_model()
    found = {"weights": {name: p.detach().clone() for name, p in model.named_parameters()}}
    token_mean = batch.mask.double() / batch.mask.sum()
    for name, case in CASES.items():
        real = case.get("vocab_size", V)
        weights = token_mean if case.get("reduction") == "token_mean" else batch.weights
        found[name] = plain_step(model, batch, real, weights, **case.get("options", {}))
    stats = SimpleNamespace(**found["pruned"]["stats"])
    given = recorded(stats, batch)
    a, mask = batch.advantages, batch.mask
    metrics = clip_metrics(given["log_ratio"], a, mask, 0.1, 0.3)
    metrics |= entropy_metrics(stats.entropy, stats.logp, a, mask)
    metrics |= gradient_variance_proxy(a, stats.logp, stats.sum_p2, mask)
    metrics |= mismatch_report(stats.logp, batch.rollout_logp, mask).metrics()
    metrics |= sign_length_metrics(batch.weights, batch.outcome, mask, batch.group_ids)
    found["metrics"] = {name: float(x) for name, x in metrics.items()}
    found["losses"], decayed = [], (0.1, 0.1, 0.05, 0.025)
    for lr in decayed:
        step = plain_step(model, batch, REAL, batch.weights)
        found["losses"].append(step["loss"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * step["gradients"][name]
    found["trained"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(found, FOLDER / "reference.pt")


# What every world does of it


def reference():
    return torch.load(FOLDER / "reference.pt")


def local(model, whole):
    """This rank's part of tensors by the names of the whole model."""
    found = {}
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    first = model.decoder.layers[0].layer_number - 1
    for name, p in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        tensor = whole[".".join(parts)]
        if getattr(p, "tensor_model_parallel", False):
            # gate and up of a feed-forward layer are cut each
            pieces = tensor.chunk(tp * p.partition_stride, p.partition_dim)
            tensor = torch.cat(pieces[rank::tp], p.partition_dim)
        assert tensor.shape == p.shape
        found[name] = tensor
    return found


def load(model, whole):
    with torch.no_grad():
        for name, tensor in local(model, whole).items():
            model.get_parameter(name).copy_(tensor)


def make_wrapped(whole, **options):
    model = make_model(**options)
    load(model, whole)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    return model, wrapped


def microbatches(batch):
    """Those of this data parallel rank."""
    rank, ranks = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    parts = [rows_of(batch, slice(i, i + ROWS)) for i in range(0, B, ROWS)]
    return parts[rank::ranks]


def run_schedule(wrapped, batch, case, loss=None, *, forward_only=False, **schedule):
    """Megatron's forward and backward of this rank's micro-batches; what the loss logged."""
    parts = microbatches(batch)
    last = parallel_state.is_pipeline_last_stage()
    token_mean = case.get("reduction") == "token_mean"

    def forward_step(iterator, model):
        part = next(iterator)
        logits = call(model, part, runtime_gather_output=case.get("gather"))

        def own_loss(stats):
            weights = part.mask.double() if token_mean else part.weights
            return objective(stats, part, weights), {"tokens": part.mask.sum()}

        return logits, policy_loss_function(
            model,
            part.labels if last else None,
            part.mask if last else None,
            own_loss if loss is None else lambda stats: loss(stats, part),
            vocab_size=case.get("vocab_size"),
            reduction=case.get("reduction", "sum"),
            num_microbatches=None if case.get("per_token") else len(parts),
            **case.get("options", {}),
        )

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(parts),
        model=[wrapped],
        num_microbatches=len(parts),
        seq_length=T,
        micro_batch_size=ROWS,
        forward_only=forward_only,
        **schedule,
    )


CASES = {
    "sum": {"vocab_size": REAL},
    "pruned": {"vocab_size": REAL, "options": PRUNED, "per_token": True},
    "token_mean": {"reduction": "token_mean", "per_token": True},
    "gathered": {"vocab_size": REAL, "gather": True},
}


def sum_over_data(value):
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item()


def check_losses():
    """Loss, statistics and gradients of every case are those of the whole batch in one process."""
    batch, truth = make_batch(), reference()
    cut = parallel_state.get_tensor_model_parallel_world_size() > 1
    for name, case in CASES.items():
        if name == "gathered" and not cut:
            continue
        model, wrapped = make_wrapped(
            truth["weights"], calculate_per_token_loss=case.get("per_token", False)
        )
        logged = run_schedule(wrapped, batch, case)
        # Megatron divides by a number of tokens in float32
        bound = 1e-7 if case.get("reduction") == "token_mean" else 1e-11
        assert_same(take_gradients(model), local(model, truth[name]["gradients"]), bound)
        if parallel_state.is_pipeline_last_stage():
            tokens = sum_over_data(float(sum(x["tokens"] for x in logged)))
            assert tokens == batch.mask.sum()
            total = sum_over_data(float(sum(x["loss"] for x in logged)))
            total /= tokens if case.get("reduction") == "token_mean" else 1
            assert abs(total - truth[name]["loss"]) < 1e-12 * abs(total), (
                name,
                total,
                truth[name]["loss"],
            )
        with torch.no_grad():
            kept = run_schedule(wrapped, batch, case, forward_only=True, collect_non_loss_data=True)
        expected = microbatches(SimpleNamespace(**truth[name]["stats"]))
        for stats, part in zip(kept, expected, strict=True) if kept else ():
            for key, wanted in vars(part).items():
                torch.testing.assert_close(getattr(stats, key), wanted, rtol=0, atol=1e-12)
        assert bool(kept) == parallel_state.is_pipeline_last_stage()


def check_monitors():
    """Numbers of all rows, the same to the last bit on every rank, from its stage or another."""
    batch, truth = make_batch(), reference()
    model, wrapped = make_wrapped(truth["weights"], calculate_per_token_loss=True)
    clip = ClipEntropyMonitor(clip_low=0.1, clip_high=0.3, warmup=1, smoothing=0.0)
    others = [GradientNormMonitor(), VarianceMonitor(), MismatchMonitor(), SignLengthMonitor()]
    watch = StabilityWatch([clip, *others])
    monitors = MegatronMonitors(model.config, watch)

    def loss(stats, part):
        longest = int(part.mask.any(0).nonzero().max()) + 1  # micro-batches of unlike width
        given = recorded(stats, part) | {"mask": part.mask}
        cut = {name: x[:, :longest] if x.ndim == 2 else x for name, x in given.items()}
        statistics = TokenStats(*(x if x is None else x[:, :longest] for x in stats))
        monitors.record(statistics, **cut)
        return objective(stats, part, part.weights)

    with torch.no_grad():  # counts nowhere
        run_schedule(wrapped, batch, CASES["pruned"], loss, forward_only=True)
    for norm in (1.0, float("inf")):
        run_schedule(wrapped, batch, CASES["pruned"], loss)
        assert_same(take_gradients(model), local(model, truth["pruned"]["gradients"]), 1e-11)
        assert monitors.metrics == pytest.approx(truth["metrics"], rel=1e-9, abs=1e-12)
        verdict = monitors.judge({"grad_norm": norm})
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (monitors.metrics, verdict, watch.state_dict()))
        assert all(other == everyone[0] for other in everyone)
    assert verdict.reading.state == "alarm" and "grad_norm is inf" in verdict.reading.reason
    assert verdict.reading.metrics["entropy/relative"] == 1
    assert "variance/total_power" in verdict.reading.metrics
    run_schedule(wrapped, batch, CASES["pruned"])  # nothing recorded
    assert monitors.metrics == {} and monitors.judge().reading.state == "healthy"


def check_monitors_fail_on_every_rank():
    """What the last stage cannot measure, or a rank records otherwise, no rank waits for."""
    batch, truth = make_batch(), reference()
    model, wrapped = make_wrapped(truth["weights"], calculate_per_token_loss=True)
    monitors = MegatronMonitors(model.config, StabilityWatch([ClipEntropyMonitor()]))
    case, first = CASES["pruned"], parallel_state.get_data_parallel_rank() == 0

    def broken(stats, part):
        log_ratio = torch.full_like(part.advantages, torch.nan if first else 0.0)
        monitors.record(stats, part.mask, advantages=part.advantages, log_ratio=log_ratio)
        return objective(stats, part, part.weights)

    with pytest.raises(ValueError, match=r"expected (finite log_ratio|sound input)"):
        run_schedule(wrapped, batch, case, broken)

    def unlike(stats, part):
        monitors.record(stats, part.mask, advantages=part.advantages if first else None)
        return objective(stats, part, part.weights)

    if parallel_state.get_data_parallel_world_size() > 1:
        with pytest.raises(ValueError, match="the same tensors on all ranks"):
            run_schedule(wrapped, batch, case, unlike)


def check_training():
    """Four steps, with a rate halved twice: weights are those of one process."""
    batch, truth = make_batch(), reference()
    model, wrapped = make_wrapped(truth["weights"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = length_triggered(
        OptimizerParamScheduler(
            optimizer, 0.1, 0.1, 0.0, 0, 10, "constant", 0.0, 0.0, 10, "constant"
        ),
        warmup=1, smoothing=0.0, period_factor=1.0,
    )  # fmt: skip
    for length, loss in zip((10, 100, 100, 100), truth["losses"], strict=True):
        wrapped.zero_grad_buffer()
        logged = run_schedule(wrapped, batch, CASES["sum"])
        if parallel_state.is_pipeline_last_stage():
            total = sum_over_data(float(sum(x["loss"] for x in logged)))
            assert abs(total - loss) < 1e-10 * abs(loss)
        for p in model.parameters():
            p.grad = p.main_grad
        optimizer.step()
        optimizer.zero_grad()  # else the next gradients are added to both, which are one
        scheduler.observe(length)
        scheduler.step(1)
    assert scheduler.triggered_at == 1 and scheduler.factor == 0.125
    for name, wanted in local(model, truth["trained"]).items():
        torch.testing.assert_close(model.get_parameter(name), wanted, rtol=0, atol=1e-11)


# Tensor parallel


def check_sequence_parallel():
    """The head reads the whole sequence. Switched on late: PyTorch's norms refuse it."""
    batch, truth = make_batch(), reference()
    model, wrapped = make_wrapped(truth["weights"])
    model.config.sequence_parallel = True
    for module in model.modules():
        for name, value in (
            ("sequence_parallel", True),
            ("reduce_scatter_embeddings", True),
            ("allreduce_dgrad", False),
        ):
            if hasattr(module, name):
                setattr(module, name, value)
    for name, p in model.named_parameters():
        p.sequence_parallel = "norm" in name
    run_schedule(wrapped, batch, CASES["sum"])
    assert_same(take_gradients(model), local(model, truth["sum"]["gradients"]), 1e-11)


def check_padding_of_a_rank():
    """A rank with nothing but padding is refused, by all ranks."""
    model = make_model()
    for size in (V // 2, V + 1):
        with pytest.raises(ValueError, match=r"vocab_size: expected .* above 32 .*2 tensor par"):
            policy_loss_function(model, None, None, len, vocab_size=size, num_microbatches=1)


# One process


def check_half_precision():
    """Float16Module, whose logits are float32."""
    batch, truth = make_batch(), reference()
    half = make_model(dtype=torch.bfloat16, bf16=True)
    load(half, truth["weights"])
    wrapped = Float16Module(half.config, half)
    run_schedule(wrapped, batch, CASES["sum"])
    error = prefix_workers.distance(take_gradients(half), truth["sum"]["gradients"])
    assert error < 0.05, error


def check_prefix_beside_the_monitors():
    """MegatronSharedPrefix leaves the hook alone, and the caller's finalize is an event of it."""
    model = make_model()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    monitors = MegatronMonitors(model.config, StabilityWatch([ClipEntropyMonitor()]))
    hook, group = model.config.finalize_model_grads_func, prefix_workers.make_group()
    own = prefix_workers.loss_of(group)

    def loss(out, wave):
        weights = group.weights[wave.rows][:, : wave.mask.shape[1]]
        monitors.record(out.stats, wave.mask, advantages=weights)
        return own(out, wave)

    step = MegatronSharedPrefix(wrapped, wave_tokens=12, min_bound=0.0)
    step.accumulate(group.prompt, group.responses, loss)
    assert model.config.finalize_model_grads_func == hook and not monitors.metrics
    hook([wrapped])
    found = step.statistics(group.prompt, group.responses)
    mask = torch.arange(9) < torch.tensor([len(x) for x in group.responses])[:, None]
    wanted = found.stats.entropy[mask].mean().item()
    assert monitors.metrics["entropy/mean"] == pytest.approx(wanted, rel=1e-12)
    assert monitors.judge().reading.metrics["entropy/mean"] == monitors.metrics["entropy/mean"]


def check_refusals():
    batch, model = make_batch(), make_model()
    config, tokens = model.config, batch.labels

    def function(**options):
        given = {"num_microbatches": 1} | options
        return policy_loss_function(model, tokens, batch.mask, lambda s: s.logp.sum(), **given)

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            function(**options)

    refused("num_microbatches: expected.*calculate_per_token_loss=True", num_microbatches=None)
    refused("num_microbatches: expected", num_microbatches=0)
    refused("reduction: expected 'sum' or 'token_mean', got 'mean'", reduction="mean")
    refused("'token_mean' needs calculate_per_token_loss=True", reduction="token_mean")
    for size in (0, V + 1):
        refused(f"vocab_size: expected.*above 0 and at most the model's {V}", vocab_size=size)
    refused("temperature: expected a finite number", temperature=0.0)
    refused(r"prune: expected a finite number in \(0, 1\), got 2.0", prune=2.0)
    config.context_parallel_size = 2
    refused("context_parallel_size is 2, expected 1")
    config.finalize_model_grads_func = finalize_model_grads
    watch = StabilityWatch([ClipEntropyMonitor()])
    with pytest.raises(ValueError, match="context_parallel_size is 2, expected 1"):
        MegatronMonitors(config, watch)
    config.context_parallel_size = 1
    config.calculate_per_token_loss, config.num_moe_experts = True, 2
    config.moe_aux_loss_coeff = [0.0, 0.01]
    refused("moe_aux_loss_coeff.*'token_mean', or calculate_per_token_loss=False")
    function(reduction="token_mean")
    config.moe_aux_loss_coeff = 0.0
    function()
    config.calculate_per_token_loss, config.num_moe_experts = False, None
    with pytest.raises(ValueError, match=r"expected a GPTModel, alone or in .* got Linear"):
        policy_loss_function(torch.nn.Linear(2, 2), tokens, batch.mask, lambda s: s.logp.sum())
    logits = call(model, batch)
    for labels, mask, name in ((None, batch.mask, "labels"), (batch.labels, None, "mask")):
        unset = policy_loss_function(model, labels, mask, len, num_microbatches=1)
        with pytest.raises(ValueError, match=f"{name}: expected .* on the last stage .* got None"):
            unset(logits)
    for wrong in (logits[..., 0], logits[..., : V // 2 + 1]):
        with pytest.raises(ValueError, match=r"output_tensor: expected logits \[B, T, V\]"):
            function()(wrong)
    with pytest.raises(ValueError, match="expected tokens in"):
        tokens = batch.labels.clone()
        tokens[0, 4] = REAL
        function(vocab_size=REAL)(logits)
    tokens = batch.labels
    for loss, message in (
        (lambda s: s.logp, "loss: expected a scalar tensor with a graph"),
        (lambda s: 0.0, "loss: expected a scalar tensor with a graph"),
        (lambda s: s.logp.detach().sum(), "loss: expected a scalar tensor with a graph"),
        (lambda s: (s.logp.sum(), {"loss": 1.0}), "none of them 'loss'"),
        (lambda s: (s.logp.sum(), 1.0), "expected numbers for the log"),
    ):
        made = policy_loss_function(model, tokens, batch.mask, loss, num_microbatches=1)
        with pytest.raises(ValueError, match=message):
            made(logits)


def check_monitor_refusals():
    batch, model = make_batch(), make_model()
    watch = StabilityWatch([ClipEntropyMonitor()])
    with pytest.raises(ValueError, match="expected finalize_model_grads_func to be set"):
        MegatronMonitors(model.config, watch)
    calls = []
    model.config.finalize_model_grads_func = lambda *args, **kw: calls.append((args, kw)) or "done"
    monitors = MegatronMonitors(model.config, watch)
    with pytest.raises(ValueError, match="expected one MegatronMonitors, got a second"):
        MegatronMonitors(model.config, watch)
    truth = SimpleNamespace(**reference()["sum"]["stats"])
    monitors.record(truth, batch.mask, advantages=batch.advantages)
    with pytest.raises(ValueError, match="expected the tensors of the step's first micro-batch"):
        monitors.record(truth, batch.mask)
    with pytest.raises(ValueError, match=r"advantages: expected \[B, T\] of the mask"):
        monitors.record(truth, batch.mask, advantages=batch.advantages[:, 1:])
    done = model.config.finalize_model_grads_func([model], None, force_all_reduce=True)
    assert done == "done" and calls == [(([model], None), {"force_all_reduce": True})]
    assert monitors.metrics["entropy/mean"] > 0


EVERYWHERE = [check_losses, check_monitors, check_monitors_fail_on_every_rank, check_training]
CHECKS = [
    # ranks, TP, PP
    (
        (1, 1, 1),
        [
            write_reference,
            *EVERYWHERE,
            check_half_precision,
            check_prefix_beside_the_monitors,
            check_refusals,
            check_monitor_refusals,
        ],
    ),
    ((2, 2, 1), [*EVERYWHERE, check_sequence_parallel, check_padding_of_a_rank]),
    ((2, 1, 2), EVERYWHERE),
    ((2, 1, 1), EVERYWHERE),
]
SLOW = [((1, 1, 1), [write_reference]), ((4, 2, 2), EVERYWHERE), ((4, 2, 1), EVERYWHERE)]


def run(rank, folder, worlds):
    global FOLDER
    FOLDER = Path(folder)
    prefix_workers.run(rank, folder, worlds)
