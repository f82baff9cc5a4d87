"""Checks that test_integration_megatron.py runs in processes of their own, of Megatron on a CPU.

`run` is started once in every process and goes through the worlds of CHECKS, each a process group
of its own with its tensor (TP) and pipeline (PP) parallel sizes; what is left is data parallel.
A group's gradients are compared with those of each trajectory on its own, through Megatron's own
attention and schedule and PyTorch's log-softmax, in float64.
"""

import contextlib
import gc
import logging
import runpy
import sys
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fusions import fused_softmax
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from trimtab.integrations.megatron import MegatronSharedPrefix
from trimtab.rl.prefix_phases import PrefixStore

V = 64
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
LEARNED = {
    "position": "learned_absolute",
    "tied": True,
    "normalization": "LayerNorm",
    "num_query_groups": 4,
    "gated_linear_unit": False,
    "activation_func": F.gelu,
    "add_bias_linear": True,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_dtype": "fp64",
}


class OnCpu(TorchFunctionMode):
    """Megatron writes device="cuda", and asks tensors for the name of their type on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found


def megatron_on_cpu():
    """The process is given to Megatron: what it asks of CUDA is answered by the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: None  # only named, by 0.19
    moe_utils.te_general_gemm = None  # 0.16.1 looks the name up without Transformer Engine, too
    # a replay inside backward is out of reach of the mode
    fused_softmax.get_default_causal_mask = lambda n: torch.ones(n, n, dtype=torch.bool).triu(1)
    # no dropout here, so a replay needs no random state of a GPU
    megatron_random._get_all_rng_states = lambda: ()
    megatron_random._set_all_rng_states = lambda: None
    megatron_random._fork_rng = contextlib.nullcontext
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    return OnCpu()


def megatron_example(rank, folder, path):
    """An example of Megatron-core, tensor parallel over two ranks; their output goes to files."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    with (
        megatron_on_cpu(),
        mock.patch.object(sys, "argv", [path, "2"]),
        mock.patch.object(dist, "init_process_group"),
        open(f"{folder}/{rank}", "w") as output,
        contextlib.redirect_stdout(output),
    ):
        runpy.run_path(path, run_name="__main__")


# What is compared


def make_model(*, position="rope", tied=False, dtype=torch.float64, vp_stage=None, **options):
    torch.manual_seed(0)
    settings = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }
    config = TransformerConfig(**(settings | options))
    spec = get_gpt_layer_local_spec(config.num_moe_experts, normalization=config.normalization)
    model = GPTModel(
        config,
        spec,
        vocab_size=V,
        max_sequence_length=64,
        position_embedding_type=position,
        share_embeddings_and_output_weights=tied,
        pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
        vp_stage=vp_stage,
    )
    return model.to(dtype)


def make_group(prompt=13, lengths=(5, 1, 9, 4, 7), seed=1):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(V, (prompt,), generator=generator).tolist()
    responses = [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]
    weights = torch.randn(len(lengths), max(lengths), generator=generator, dtype=torch.float64)
    return SimpleNamespace(prompt=prompt, responses=responses, weights=weights)


def loss_of(group):
    """Weighted log-probabilities and some entropy, as a view of one entry."""

    def loss(out, wave):
        weights = group.weights[wave.rows][:, : wave.mask.shape[1]]
        parts = (weights * out.logp + 0.1 * weights.cos() * out.stats.entropy) * wave.mask
        return parts.sum()[None]

    return loss


def dense(model, group, train=True):
    """Each trajectory alone; its log-probabilities on the last stage."""
    found = []

    def forward_step(iterator, called):
        row, response = next(iterator)
        ids = group.prompt + response[:-1]
        positions = torch.arange(len(ids))
        logits = called(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            attention_mask=None,
            runtime_gather_output=True,
        )

        def take(logits):
            log_p = logits[0, len(group.prompt) - 1 :].log_softmax(-1)
            logp = log_p.gather(-1, torch.tensor(response)[:, None])[:, 0]
            found.append(logp.detach())
            weights = group.weights[row, : len(response)]
            entropy = -(log_p.exp() * log_p).sum(-1)
            return (weights * logp + 0.1 * weights.cos() * entropy).sum(), {}

        return logits, take

    for number, response in enumerate(group.responses):
        with torch.set_grad_enabled(train):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([(number, response)]),
                model=[model],
                num_microbatches=1,
                seq_length=len(group.prompt) + len(response) - 1,
                micro_batch_size=1,
                forward_only=not train,
            )
    return found


def take_gradients(model):
    """By name, and away."""
    found = {}
    for name, p in model.named_parameters():
        grad = getattr(p, "main_grad", p.grad)
        found[name] = None if grad is None else grad.clone()
        if hasattr(p, "main_grad"):
            p.main_grad.zero_()
        p.grad = None
    return found


def assert_same(found, expected, bound=1e-12):
    """Relative L2 distance of every parameter's gradient."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, truth in expected.items():
        assert (found[name] is None) == (truth is None), name
        if truth is not None:
            assert truth.norm() > 0, name
            worst = max(worst, float((found[name] - truth).norm() / truth.norm()))
    assert worst < bound, worst
    print(f"  worst relative L2 of a gradient {worst:.1e}", flush=True)


def check_group(model, group, wave_tokens=12, *, bound=1e-12, **options):
    """Gradients, loss and statistics are those of each trajectory alone."""
    logp = dense(model, group)
    expected = take_gradients(model)
    step = MegatronSharedPrefix(model, wave_tokens=wave_tokens, min_bound=0.0, **options)
    metrics = step.accumulate(group.prompt, group.responses, loss_of(group))
    assert_same(take_gradients(model), expected, bound)
    assert metrics["prefix/shared"] == 1.0
    out = step.statistics(group.prompt, group.responses)
    last = parallel_state.is_pipeline_last_stage()
    assert (out is not None) == last == ("prefix/loss" in metrics)
    if last:
        for row, alone in enumerate(logp):
            torch.testing.assert_close(out.logp[row, : len(alone)], alone, rtol=0, atol=bound)
            assert not out.logp[row, len(alone) :].any()
    assert_same(take_gradients(model), dict.fromkeys(expected))
    return metrics


# One process, and what runs in every world


def check_waves():
    """One response a wave, some, and all; a prefix longer and shorter than the responses."""
    model = make_model()
    for wave_tokens in (1, 12, 1000):
        check_group(model, make_group(), wave_tokens)
    check_group(model, make_group(2, (3, 8)))
    check_group(model, make_group(30, (6,)))
    check_group(model.eval(), make_group())


def check_full_recompute():
    check_group(make_model(**FULL), make_group())


def check_selective_recompute():
    check_group(make_model(**SELECTIVE), make_group())


def check_freed_outputs():
    """A stage frees what it has sent; several waves are under way."""
    check_group(make_model(deallocate_pipeline_outputs=True), make_group())


def check_learned_positions():
    check_group(make_model(**LEARNED), make_group())


def check_interleaved_rotary():
    check_group(make_model(rotary_interleaved=True), make_group())


def check_sums_and_loss_scale():
    """Groups add up, and a loss scale scales."""
    model, groups = make_model(), [make_group(), make_group(9, (4, 4), seed=2)]
    for group in groups:
        dense(model, group)
    expected = {name: grad * 8 for name, grad in take_gradients(model).items()}
    model.config.grad_scale_func = lambda loss: loss * 8
    step = MegatronSharedPrefix(model, wave_tokens=12, min_bound=0.0)
    for group in groups:
        step.accumulate(group.prompt, group.responses, loss_of(group))
    assert_same(take_gradients(model), expected)


def check_ddp():
    """Gradients go to `main_grad`, and are reduced by the caller, once."""
    group = make_group(seed=1 + parallel_state.get_data_parallel_rank())
    world = parallel_state.get_data_parallel_world_size()
    for overlap in (False, True):
        model = make_model()
        dense(model, group)
        expected = take_gradients(model)
        for grad in expected.values():
            dist.all_reduce(grad, group=parallel_state.get_data_parallel_group())
            grad /= world
        settings = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=2000)
        wrapped = DistributedDataParallel(model.config, settings, model)
        model.config.no_sync_func = wrapped.no_sync
        model.config.finalize_model_grads_func = finalize_model_grads
        step = MegatronSharedPrefix([wrapped], wave_tokens=12, min_bound=0.0)
        for _ in range(2):
            wrapped.zero_grad_buffer()
            step.accumulate(group.prompt, group.responses, loss_of(group))
            if overlap:
                wrapped.start_grad_sync()
            finalize_model_grads([wrapped])
            assert_same(take_gradients(model), expected)
        assert model.config.no_sync_func == wrapped.no_sync
        assert model.config.finalize_model_grads_func is finalize_model_grads


def check_tied_embeddings():
    """The first and the last stage add up their parts when the caller finalizes."""
    model, group = make_model(**LEARNED), make_group()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    step = MegatronSharedPrefix(wrapped, wave_tokens=12, min_bound=0.0)
    found = []
    for run in (
        lambda: dense(wrapped, group),
        lambda: step.accumulate(group.prompt, group.responses, loss_of(group)),
    ):
        wrapped.zero_grad_buffer()
        run()
        finalize_model_grads([wrapped])
        found.append(take_gradients(model))
    assert_same(found[1], found[0])


def check_dense_route():
    model, group = make_model(), make_group(4, (9, 8, 7))
    logp = dense(model, group)
    expected = take_gradients(model)
    step = MegatronSharedPrefix(model, min_bound=1.2)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("trimtab.integrations.megatron_prefix").addHandler(handler)
    metrics = step.accumulate(group.prompt, group.responses, loss_of(group))
    assert_same(take_gradients(model), expected)
    assert metrics["prefix/bound"] < 1.2 and metrics["prefix/shared"] == 0
    assert metrics["prefix/unique_tokens"] == metrics["prefix/logical_tokens"] == 24 + 3 * 3
    out = step.statistics(group.prompt, group.responses)
    if out is not None:
        for row, alone in enumerate(logp):
            torch.testing.assert_close(out.logp[row, : len(alone)], alone, rtol=0, atol=1e-12)
    (record,) = records
    assert "run densely" in record.getMessage()
    # a prompt of one token has no prefix
    assert check_route(MegatronSharedPrefix(model, min_bound=0.0), make_group(1)) == 0
    assert check_route(step, make_group(40, (3,) * 8)) == 1


def check_route(step, group):
    metrics = step.accumulate(group.prompt, group.responses, loss_of(group))
    take_gradients(step.gpt)
    return metrics["prefix/shared"]


def check_metrics():
    """FLOPs are those of the modules; tokens are counted once, the head sees responses only."""
    group = make_group(41, (4, 4, 4, 4))
    for options in ({}, EXPERTS):
        model = make_model(**options)
        step = MegatronSharedPrefix(model, min_bound=0.0)
        matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2}
        share = 0.5 if options else 1
        token = sum(
            2 * size * (share if "experts" in name else 1)
            for name, size in matrices.items()
            if "layers" in name and "router" not in name
        )
        assert step.cost.token == token
        assert step.cost.head == 2 * matrices["output_layer.weight"]
        assert step.cost.pair == 4 * 32 * 4
    model, heads = make_model(), []
    model.output_layer.register_forward_hook(lambda _, args, out: heads.append(len(args[0])))
    step = MegatronSharedPrefix(model, wave_tokens=8)
    metrics = step.accumulate(group.prompt, group.responses, loss_of(group))
    assert heads == [8, 8]
    assert metrics["prefix/shared"] == 1 and 1.2 < metrics["prefix/bound"] < 4
    assert metrics["prefix/unique_tokens"] == 40 + 16
    assert metrics["prefix/logical_tokens"] == 4 * 44
    assert metrics["prefix/saved_tokens"] == 3 * 40
    assert metrics["prefix/hot_bytes"] == 4 * 40 * 4 * 2 * 8 * 8  # layers, P, K V gK gV, heads, D


def check_experts():
    """Megatron's router takes its softmax in float32."""
    for options in ({}, {"moe_shared_expert_intermediate_size": 16}, FULL):
        check_group(make_model(**EXPERTS, **options), make_group(), bound=1e-6)


def check_half_precision():
    """In bf16 as near to float64 as the dense model in bf16 is."""
    group = make_group(24, (6, 3, 8, 5))
    model = make_model()
    dense(model, group)
    truth = take_gradients(model)
    half = make_model(dtype=torch.bfloat16, bf16=True)
    with torch.no_grad():
        for mine, p in zip(half.parameters(), model.parameters(), strict=True):
            mine.copy_(p)
    wrapped = Float16Module(half.config, half)
    dense(wrapped, group)
    errors = [distance(take_gradients(half), truth)]
    step = MegatronSharedPrefix(wrapped, wave_tokens=12, min_bound=0.0)
    step.accumulate(group.prompt, group.responses, loss_of(group))
    errors.append(distance(take_gradients(half), truth))
    print("  bf16 dense, shared", errors, flush=True)
    assert errors[1] < 1.25 * errors[0] < 0.1


def distance(found, truth):
    error = sum((found[name].double() - grad).square().sum() for name, grad in truth.items())
    return float((error / sum(grad.square().sum() for grad in truth.values())).sqrt())


# Refusals


def check_refusals():
    model = make_model(recompute_granularity=None)
    step, group = MegatronSharedPrefix(model), make_group()
    for name, value in {
        "window_size": (4, 0),
        "context_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "multi_latent_attention": True,
        "experimental_attention_variant": "gated_delta_net",
        "softmax_type": "learnable",
        "qk_clip": True,
        "log_max_attention_logit": True,
        "fused_single_qkv_rope": True,
        "mtp_num_layers": 1,
        "fp8": "hybrid",
        "fp4": "e2m1",
        "cuda_graph_impl": "local",
        "tp_comm_overlap": True,
        "cpu_offloading": True,
        "fine_grained_activation_offloading": True,
        "defer_embedding_wgrad_compute": True,
        "delay_wgrad_compute": True,
        "overlap_moe_expert_parallel_comm": True,
        "hybrid_context_parallel": True,
        "moe_expert_capacity_factor": 1.0,
        "moe_token_dropping": True,
        "moe_input_jitter_eps": 0.01,
        "moe_router_force_load_balancing": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_aux_loss_coeff": [0.0, 0.01],
        "moe_z_loss_coeff": 0.001,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
    }.items():
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=rf"model: {name} is "):
            MegatronSharedPrefix(model)
        with pytest.raises(ValueError, match=rf"model: {name} is "):
            step.accumulate(group.prompt, group.responses, loss_of(group))
        setattr(model.config, name, before)
    model.config.hidden_dropout = 0.1
    MegatronSharedPrefix(model.eval())
    model.train()
    model.config.hidden_dropout = 0.0
    model.position_embedding_type = "yarn"
    with pytest.raises(ValueError, match="position_embedding_type is 'yarn'"):
        MegatronSharedPrefix(model)
    model.position_embedding_type = "rope"
    attention = model.decoder.layers[1].self_attention
    attention.attn_mask_type = AttnMaskType.padding
    with pytest.raises(ValueError, match=r"attention mask AttnMaskType.padding"):
        MegatronSharedPrefix(model)
    attention.attn_mask_type = AttnMaskType.causal
    model.decoder.layers[1].self_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="a layer attends by Identity"):
        MegatronSharedPrefix(model)


def check_refused_arguments():
    model, group = make_model(), make_group()
    for options, message in (
        ({"accum_dtype": torch.bfloat16}, "accum_dtype: expected"),
        ({"wave_tokens": 0}, "wave_tokens: expected"),
        ({"min_bound": -1.0}, "min_bound: expected"),
        ({"prefix_memory": "keep"}, "prefix_memory: expected 'recompute', got 'keep'"),
        ({"prefix_memory": "disk"}, "prefix_memory: expected"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"prune": 1.5}, "prune: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            MegatronSharedPrefix(model, **options)
    with pytest.raises(ValueError, match="expected one chunk"):
        MegatronSharedPrefix([model, model])
    for other in (torch.nn.Linear(2, 2), torch.nn.DataParallel(model)):
        with pytest.raises(ValueError, match="expected a GPTModel"):
            MegatronSharedPrefix(other)
    step, right = MegatronSharedPrefix(model, min_bound=0.0), loss_of(group)
    unequal = torch.tensor([[1, 2, 3], [1, 4, 3]])
    for prompt, responses, loss, message in (
        (unequal, group.responses, right, "the same prompt in every row"),
        (group.prompt, [], right, "responses: expected at least one"),
        (group.prompt, [[1], []], right, r"responses\[1\]"),
        (group.prompt, [[V]], right, f"got {V}"),
        (group.prompt, group.responses, lambda *_: torch.zeros(()), "loss: expected a scalar"),
        (group.prompt, group.responses, lambda out, _: out.logp, "loss: expected a scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            step.accumulate(prompt, responses, loss)


def check_a_model_that_packs_itself():
    """Or that drops what it is called with: its attention would see other sequences."""
    model, group = make_model(), make_group()
    block = model.decoder.forward
    model.decoder.forward = lambda *args, packed_seq_params, **kwargs: block(*args, **kwargs)
    step = MegatronSharedPrefix(model, min_bound=0.0)
    with pytest.raises(ValueError, match="packed_seq_params: the model packs sequences itself"):
        step.accumulate(group.prompt, group.responses, loss_of(group))


def check_sequence_parallel_lengths():
    model = make_model()
    model.config.sequence_parallel = True
    step = MegatronSharedPrefix(model, min_bound=0.0)
    for group, what in ((make_group(4, (2, 2)), "prefix"), (make_group(5, (2, 1)), "wave")):
        with pytest.raises(ValueError, match=rf"multiples of 2 ranks, got 3 of (the|a) {what}"):
            step.accumulate(group.prompt, group.responses, loss_of(group))


def check_an_error_in_the_loss():
    model, group = make_model(), make_group()
    before = snapshot(model)

    def fails(out, wave):
        if wave.rows[0] > 0:
            assert snapshot(model) != before and stored()
            raise KeyError("mine")
        return out.logp.sum()

    step = MegatronSharedPrefix(model, wave_tokens=12, min_bound=0.0)
    with pytest.raises(KeyError, match="mine") as caught:
        step.accumulate(group.prompt, group.responses, fails)
    assert snapshot(model) == before and not stored()
    assert caught.tb is not None  # whose frames hold the store
    take_gradients(model)
    check_group(model, group)
    assert snapshot(model) == before and not stored()


def stored():
    """Whether any store holds keys and values."""
    return any(x.segments for x in gc.get_objects() if type(x) is PrefixStore)


def snapshot(model):
    """Everything of the model's modules and its configuration, by identity."""
    modules = {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("input_tensor", "current_microbatch", "inv_freq")
    }
    return modules, {key: id(value) for key, value in vars(model.config).items()}


CHECKS = [
    # ranks, TP, PP
    (
        (1, 1, 1),
        [
            check_waves,
            check_full_recompute,
            check_selective_recompute,
            check_learned_positions,
            check_interleaved_rotary,
            check_sums_and_loss_scale,
            check_ddp,
            check_dense_route,
            check_metrics,
            check_half_precision,
            check_refusals,
            check_refused_arguments,
            check_a_model_that_packs_itself,
            check_an_error_in_the_loss,
        ],
    ),
    (
        (2, 2, 1),
        [
            check_waves,
            check_full_recompute,
            check_selective_recompute,
            check_learned_positions,
            check_dense_route,
            check_sequence_parallel_lengths,
        ],
    ),
    (
        (2, 1, 2),
        [
            check_waves,
            check_full_recompute,
            check_selective_recompute,
            check_freed_outputs,
            check_tied_embeddings,
            check_dense_route,
        ],
    ),
    ((2, 1, 1), [check_ddp]),
]
SLOW = [((1, 1, 1), [check_experts]), ((4, 2, 2), [check_waves, check_full_recompute])]


def check_id(world, check):
    ranks, tp, pp = world
    return f"{check.__name__.removeprefix('check_')}-tp{tp}-pp{pp}-dp{ranks // (tp * pp)}"


def run(rank, folder, worlds):
    """Every check of every world this process belongs to; rank 0 notes those that passed."""
    torch.set_num_threads(1)
    with megatron_on_cpu():
        for number, (world, checks) in enumerate(worlds):
            ranks, tp, pp = world
            if rank >= ranks:
                continue
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous{number}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=120),
            )
            parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
            for check in checks:
                if rank == 0:
                    print(check_id(world, check), flush=True)
                check()
                dist.barrier()
                if rank == 0:
                    with open(f"{folder}/passed", "a") as notes:
                        notes.write(f"{check_id(world, check)}\n")
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
