"""Checks that test_integration_megatron_optimizer.py runs in processes of Megatron on a CPU.

`run` is started once in every process and goes through the worlds of CHECKS, each a process group
of its own. A GPTModel is trained over tensor (tp), pipeline (pp), expert (ep) and data parallel
ranks by Megatron's own stack, and compared with the whole model in one process, which has nothing
of Megatron but the layers: its gradients are averaged here, clipped by torch, and taken by an
AdamMini over the whole parameters.
"""

import contextlib
import functools
import queue
import zlib
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron_prefix_workers import V, make_model, megatron_on_cpu
from sharded_bag import counted_all_reduces

from trimtab.integrations.megatron import megatron_adam_mini
from trimtab.optim import AdamMini, BlockMap, from_adamw_state, infer_blocks
from trimtab.optim.entries import spread_moments

LENGTH, SEQUENCES = 8, 4
SAVED, STEPS = 1, 3
RATE = {"lr": 3e-3, "weight_decay": 0.1}
MODEL = {"num_layers": 3, "hidden_size": 40, "ffn_hidden_size": 52}  # so that shards cut rows
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 28,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
}
FULL, BY_BUCKET, GATHERED = "fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"


class Stream:
    def __getattr__(self, name):
        return lambda *args, **kwargs: Stream()


@contextlib.contextmanager
def optimizer_on_cpu():
    with megatron_on_cpu():
        torch.cuda.current_stream = lambda *_: Stream()
        torch.cuda.Stream = lambda *args, **kwargs: Stream()
        torch.cuda.stream = lambda *_: contextlib.nullcontext()
        filesystem_async._results_queue = queue.Queue()  # else a process of its own
        yield


@dataclass(frozen=True)
class Case:
    """What is trained; the model and its data do not depend on how it is cut."""

    dtype: torch.dtype = torch.float32
    tied: bool = False
    experts: bool = False
    clip: float = 0.5
    preset: str = "snr"
    layers: int = 3
    switched: bool = False  # AdamW until the checkpoint

    def model(self, **options):
        settings = {**MODEL, "num_layers": self.layers, **(EXPERTS if self.experts else {})}
        settings |= {"bf16": self.dtype is BF16, "fp16": self.dtype is FP16, "dtype": self.dtype}
        if parallel_state.get_pipeline_model_parallel_world_size() > 1 and self.layers % 2:
            settings["num_layers_in_last_pipeline_stage"] = 1
        return make_model(tied=self.tied, **settings, **options)

    @property
    def name(self):
        return f"reference-{zlib.crc32(str(self).encode()):x}.pt"


BF16, FP16 = torch.bfloat16, torch.float16
DENSE, HALF, SCALED = Case(), Case(BF16), Case(FP16)
MIXTURE, MIXED = Case(experts=True), Case(BF16, experts=True)
TIED, ROWS = Case(tied=True, preset="paper", layers=2), Case(preset="rows", clip=0.0)
SWITCHED, FOUR = replace(ROWS, switched=True), replace(DENSE, layers=4)


def batches(step):
    """[SEQUENCES, LENGTH] tokens, and those that follow."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(V, (SEQUENCES, 1), generator=generator)
    stride = torch.randint(1, 4, (SEQUENCES, 1), generator=generator)
    ids = (start + stride * torch.arange(LENGTH + 1)) % V
    return list(zip(ids[:, :-1].chunk(2), ids[:, 1:].chunk(2), strict=True))


def loss_of(model, tokens, labels):
    return model(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=labels)


# The whole model in one process


def alone(case):
    """Weights before and after training by name in fp32, gradients and norms of every step."""
    model = case.model()
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    start = {name: p.clone() for name, p in masters.items()}
    groups = [
        {"params": [(n, p) for n, p in masters.items() if p.ndim > 1]},
        {"params": [(n, p) for n, p in masters.items() if p.ndim == 1], "weight_decay": 0.0},
    ]
    blocks = infer_blocks(model, case.preset, strict=True)
    final = AdamMini([dict(group) for group in groups], **RATE, blocks=blocks, fused=False)
    optimizer = torch.optim.AdamW(groups, **RATE) if case.switched else final
    steps = []
    for step in range(STEPS):
        if step == SAVED and case.switched:
            final.load_state_dict(from_adamw_state(final, optimizer.state_dict()))
            optimizer = final
        for p in masters.values():
            p.grad = torch.zeros_like(p)
        for tokens, labels in batches(step):
            model.zero_grad()
            (loss_of(model, tokens, labels).float().mean() / 2).backward()
            for name, p in model.named_parameters():
                masters[name].grad += p.grad.float()
        gradients = {name: p.grad.clone() for name, p in masters.items()}
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), case.clip or torch.inf)
        steps.append({"gradients": gradients, "norm": float(norm)})
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    return {"start": start, "end": masters, "steps": steps}


def check_alone(folder):
    """One process trains the whole models; the others read what it has found."""
    for case in (DENSE, HALF, SCALED, MIXTURE, MIXED, TIED, ROWS, SWITCHED, FOUR):
        found = alone(case)
        moved = [(p - found["start"][n]).abs().max() for n, p in found["end"].items()]
        assert min(moved) > 1e-3
        torch.save(found, folder / case.name)


@functools.cache
def reference(folder, case):
    return torch.load(folder / case.name)


# The same by Megatron


class Run:
    """A model cut over the ranks of this world, and Megatron's optimizer.

    kind: "plain" or "sharded", the latter with use_distributed_optimizer.
    """

    def __init__(self, folder, case, kind="plain", *, adam=False, chunks=1, **options):
        self.case, self.whole = case, reference(folder, case)
        parallel = {
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size()
        }
        if chunks > 1:
            parallel["virtual_pipeline_model_parallel_size"] = chunks
        self.chunks = []
        for i in range(chunks):
            stage = {"vp_stage": i} if chunks > 1 else {}
            model = case.model(**parallel, **stage)
            if case.dtype is not torch.float32:
                model = Float16Module(model.config, model)
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=kind == "sharded",
                check_for_nan_in_grad=False,
                bucket_size=20000,
            )
            self.chunks.append(DistributedDataParallel(model.config, ddp, model))
        self.config = OptimizerConfig(
            optimizer="adam",
            lr=RATE["lr"],
            weight_decay=RATE["weight_decay"],
            clip_grad=case.clip,
            bf16=case.dtype is BF16,
            fp16=case.dtype is FP16,
            initial_loss_scale=256.0,
            params_dtype=case.dtype,
            use_distributed_optimizer=kind == "sharded",
        )
        make = get_megatron_optimizer if adam else megatron_adam_mini
        if not adam:
            options = {"preset": case.preset, "strict": True, "fused": False, **options}
        self.optimizer = make(
            self.config, self.chunks, use_gloo_process_groups=created_gloo_groups(), **options
        )
        for group in self.optimizer.param_groups:  # as Megatron's scheduler does
            group["weight_decay"] = RATE["weight_decay"] * group["wd_mult"]
        with torch.no_grad():
            for name, p in self.named():
                p.copy_(self.here(name, self.whole["start"]))
        self.optimizer.reload_model_params()

    def named(self):
        """Names in the whole model, and parameters."""
        for chunk in self.chunks:
            model = chunk.module
            model = model.module if isinstance(model, Float16Module) else model
            for name, p in model.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
                if "local_experts" in parts:
                    i = parts.index("local_experts") + 1
                    ranks = parallel_state.get_expert_model_parallel_world_size()
                    first = EXPERTS["num_moe_experts"] // ranks
                    first *= parallel_state.get_expert_model_parallel_rank()
                    parts[i] = str(first + int(parts[i]))
                key = ".".join(parts)
                tied = key not in self.whole["start"]  # on the last stage
                yield "embedding.word_embeddings.weight" if tied else key, p

    def here(self, name, whole):
        """What of a parameter of the whole model is on this rank."""
        layer, found = name.split(".")[-2], whole[name]
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        if layer == "linear_fc1":  # gates, then what they gate
            return torch.cat([half.chunk(ranks)[rank] for half in found.chunk(2)])
        dims = {"linear_qkv": 0, "linear_proj": 1, "linear_fc2": 1, "word_embeddings": 0}
        dim = {**dims, "output_layer": 0}.get(layer)
        return found if dim is None else found.chunk(ranks, dim)[rank]

    def train(self, first=0, last=STEPS, *, given=False):
        """Real steps; `given` replaces the gradients by those of the whole model.

        Where layers are cut bf16 rounds otherwise, and so do its gradients.
        """
        for config in {id(chunk.config): chunk.config for chunk in self.chunks}.values():
            config.finalize_model_grads_func = finalize_model_grads
            config.grad_scale_func = self.optimizer.scale_loss
        ranks = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        for step in range(first, last):
            mine = batches(step)[rank % 2 :: ranks]  # some ranks have the same
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            iterators = [iter(mine) for _ in self.chunks]
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(mine),
                seq_length=LENGTH,
                micro_batch_size=SEQUENCES // 2,
                forward_only=False,
            )
            expected = self.whole["steps"][step]
            if given:
                self.give(step)
            done, norm, _ = self.optimizer.step()
            assert done
            if self.case.clip and (given or self.case.dtype is torch.float32):
                assert norm == pytest.approx(expected["norm"], rel=1e-5)

    def give(self, step):
        scale = self.optimizer.get_loss_scale()
        for name, p in self.named():
            p.main_grad.copy_(scale * self.here(name, self.whole["steps"][step]["gradients"]))

    def weights(self):
        """What is updated, fp32: (name, all of it that is here, [start, stop) of it or None)."""
        for name, p in self.named():
            place = None
            if getattr(p, "main_param_sharded", False):
                for part in self.optimizer.chained_optimizers:
                    if p in part.model_param_gbuf_map:
                        place = part._get_model_param_range_map(p)["param"]
                if place is None:
                    continue
                place = place.start, place.end
            yield name, getattr(p, "main_param", p).detach(), place

    def difference(self, expected=None):
        """The largest of all weights, over all ranks."""
        worst = torch.zeros(())
        for name, found, place in self.weights():
            whole = self.here(name, expected or self.whole["end"])
            if place:
                whole = whole.flatten()[slice(*place)]
            worst = torch.maximum(worst, (found - whole).abs().max())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    def assert_same(self, bound=1e-6):
        found = self.difference()
        if dist.get_rank() == 0:
            print(f"  {self.case} {found:.1e}", flush=True)
        assert found < bound

    def save(self, folder, form=None):
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(self._sharded(form), str(folder))

    def load(self, folder, form=None):
        state = dist_checkpointing.load(self._sharded(form, is_loading=True), str(folder))
        self.chunks[0].module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sharded(self, form, **options):
        model = self.chunks[0].module.sharded_state_dict()
        metadata = {"chained_optim_avoid_prefix": True}
        if form:
            metadata["distrib_optim_sharding_type"] = form
        options["metadata"] = metadata
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, **options)}


def forward_step(iterator, model):
    tokens, labels = next(iterator)
    return loss_of(model, tokens, labels), lambda out: (out.float().mean(), {})


def created_gloo_groups():
    return parallel_state._DATA_PARALLEL_GROUP_WITH_CP_GLOO is not None


def trained(folder, case, kind="plain", **options):
    run = Run(folder, case, kind)
    run.train(**options)
    run.assert_same()
    return run


# Training


def check_dense(folder):
    """fp32 and bf16, clipped, with and without DistributedOptimizer."""
    cut = parallel_state.get_tensor_model_parallel_world_size() > 1
    for kind in ("plain", "sharded"):
        trained(folder, DENSE, kind)
        trained(folder, HALF, kind, given=cut)


def check_shards_that_cut_rows(folder):
    """One packed all-reduce a step, over the data-parallel ranks, whatever they lack."""
    run = trained(folder, ROWS, "sharded")
    (part,) = run.optimizer.chained_optimizers
    inner = part.optimizer
    rows = [
        (shard.flat[0] % shard.shape[1], shard.flat[1] % shard.shape[1])
        for shard in inner.shards.values()
        if len(shard.shape) == 2 and shard.groups
    ]
    assert any(any(pair) for pair in rows)
    assert inner.param_groups is part.param_groups
    lacking = [p for p in inner.shards if p not in inner.state]
    assert bool(lacking) == (dist.get_world_size() > 2)
    with counted_all_reduces() as counts:
        inner.step()
    assert list(counts.values()) == [1]


def check_loss_scaling(folder):
    """fp16: scaled gradients, and a step that is skipped."""
    run = trained(folder, SCALED, "sharded", given=True)
    run.give(0)
    if dist.get_rank() == 1:
        next(p for _, p in run.named()).main_grad.fill_(torch.inf)
    done, _, _ = run.optimizer.step()
    assert not done
    run.assert_same()


def check_other_blocks(folder):
    """Rows that layers cut, heads, tied weights; under both where there are 4 ranks."""
    for case in (ROWS, TIED):
        for kind in ("plain", "sharded"):
            trained(folder, case, kind)


def check_tied(folder):
    for kind in ("plain", "sharded"):
        trained(folder, TIED, kind)


def check_experts(folder):
    for kind in ("plain", "sharded"):
        run = trained(folder, MIXTURE, kind)
        assert len(run.optimizer.chained_optimizers) == 2
        trained(folder, MIXED, kind, given=True)


def check_interleaved_chunks(folder):
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    run = Run(folder, FOUR, "sharded", chunks=2)
    names = run.optimizer.chained_optimizers[0].optimizer.blocks
    assert {name.split(".")[0] for name in names} == {"chunk0", "chunk1"}
    run.train()
    run.assert_same()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


# Checkpoints


def saved_and_resumed(folder, case, kind, form, name, saved=SAVED):
    """A run that saves, and one that goes on from there, end at the same bits."""
    run = Run(folder, case, kind)
    run.train(0, saved)
    run.save(folder / name, form)
    run.train(saved)
    again = Run(folder, case, kind)
    again.load(folder / name, form)
    again.train(saved)
    for (_, found, _), (_, expected, _) in zip(again.weights(), run.weights(), strict=True):
        assert torch.equal(found, expected)


def goes_on(folder, case, kind, form, name):
    """From a checkpoint of other ranks, or of AdamW."""
    run = Run(folder, case, kind)
    run.load(folder / name, form)
    run.train(SAVED, given=case.dtype is BF16)
    run.assert_same()
    return run


def check_formats(folder):
    saved_and_resumed(folder, DENSE, "plain", None, "dp2")
    saved_and_resumed(folder, ROWS, "sharded", FULL, "dp2-sharded")
    with mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True):
        saved_and_resumed(folder, DENSE, "sharded", BY_BUCKET, "dp2-bucket")  # steps in groups
    for kind, form in (("plain", None), ("sharded", FULL)):
        saved_and_resumed(folder, DENSE, kind, form, f"dp2-{kind}-first", saved=0)
    run = Run(folder, DENSE, "sharded")
    for form in ("fully_sharded_model_space", None):
        with pytest.raises(ValueError, match=f"distrib_optim_sharding_type among .* .?{form}"):
            run.save(folder / f"refused-{form}", form)


def check_more_formats(folder):
    saved_and_resumed(folder, HALF, "plain", None, "dp2-bf16")
    saved_and_resumed(folder, HALF, "plain", None, "dp2-bf16-first", saved=0)
    saved_and_resumed(folder, HALF, "sharded", FULL, "dp2-sharded-bf16")
    saved_and_resumed(folder, HALF, "sharded", BY_BUCKET, "dp2-bucket-bf16")
    saved_and_resumed(folder, HALF, "sharded", GATHERED, "dp2-gathered")
    run = Run(folder, HALF, "sharded")
    run.optimizer.save_parameter_state(str(folder / "parameters"))
    with pytest.raises(ValueError, match="update_legacy_format: expected False, found True"):
        run.optimizer.load_parameter_state(str(folder / "parameters"), update_legacy_format=True)


def check_adam(folder):
    """A step of Megatron's own Adam, saved."""
    for kind, form in (("plain", None), ("sharded", FULL)):
        run = Run(folder, SWITCHED, kind, adam=True)
        run.train(0, SAVED)
        run.save(folder / f"adam-{kind}", form)


def check_resharding(folder):
    """Layers cut otherwise than when the checkpoint was written."""
    goes_on(folder, ROWS, "sharded", FULL, "dp2-sharded")
    goes_on(folder, SWITCHED, "sharded", FULL, "adam-sharded")


def check_more_resharding(folder):
    goes_on(folder, DENSE, "plain", None, "dp2")
    goes_on(folder, HALF, "plain", None, "dp2-bf16")
    goes_on(folder, HALF, "sharded", FULL, "dp2-sharded-bf16")
    goes_on(folder, SWITCHED, "plain", None, "adam-plain")


def check_saved_by_layers_that_are_cut(folder):
    saved_and_resumed(folder, ROWS, "sharded", FULL, "tp2-sharded")
    saved_and_resumed(folder, TIED, "plain", None, "tp2")


def check_saved_by_experts(folder):
    saved_and_resumed(folder, MIXTURE, "plain", None, "ep2")
    saved_and_resumed(folder, MIXTURE, "sharded", FULL, "ep2-sharded")


def steps_stay_on_the_cpu(run):
    """Megatron brings back all that is on a CPU, not what it had moved there."""
    (part,) = run.optimizer.chained_optimizers

    def restore(part):
        for state in part.optimizer.state.values():
            state.update({name: x.to("meta") for name, x in state.items()})

    with mock.patch.object(MegatronOptimizer, "restore_from_cpu", restore):
        run.optimizer.restore_from_cpu()
    for state in part.optimizer.state.values():
        assert {name: x.device.type for name, x in state.items()} == {
            "step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta",
        }  # fmt: skip


def check_one_process_goes_on(folder):
    goes_on(folder, ROWS, "sharded", FULL, "dp2-sharded")
    goes_on(folder, DENSE, "sharded", BY_BUCKET, "dp2-bucket")
    goes_on(folder, ROWS, "sharded", FULL, "tp2-sharded")
    goes_on(folder, TIED, "plain", None, "tp2")
    run = goes_on(folder, SWITCHED, "plain", None, "adam-plain")
    assert all(group["fused"] is False for group in run.optimizer.param_groups)  # Adam's is None
    steps_stay_on_the_cpu(run)
    with pytest.raises(ValueError, match="second moments by blocks 'snr', found 'rows'"):
        Run(folder, DENSE, "sharded").load(folder / "dp2-sharded", FULL)
    with pytest.raises(ValueError, match="second moments by blocks 'rows', found 'snr'"):
        Run(folder, ROWS).load(folder / "dp2")
    # and back to Adam
    run = Run(folder, DENSE)
    run.load(folder / "dp2")
    back = Run(folder, DENSE, adam=True)
    back.load(folder / "dp2")
    inner = [x.optimizer.chained_optimizers[0].optimizer for x in (run, back)]
    params = [[p for group in x.param_groups for p in group["params"]] for x in inner]
    for p, q in zip(*params, strict=True):
        assert inner[1].state[q]["step"] == SAVED
        assert torch.equal(inner[1].state[q]["exp_avg_sq"], spread_moments(inner[0], p))
    back.train(SAVED, SAVED + 1)


# What is refused


def check_refusals(folder):
    run = Run(folder, DENSE, adam=True)
    config, chunks, adam = run.config, run.chunks, run.optimizer

    def refused(match, *, model_chunks=chunks, **options):
        with pytest.raises(ValueError, match=match):
            megatron_adam_mini(config, model_chunks, **options)
        assert type(adam.chained_optimizers[0].optimizer) is torch.optim.AdamW

    for name, value in (
        ("optimizer", "sgd"),
        ("decoupled_weight_decay", False),
        ("use_precision_aware_optimizer", True),
        ("optimizer_cpu_offload", True),
        ("offload_optimizer_states", True),  # not in 0.16
    ):
        with mock.patch.object(config, name, value, create=True):
            refused(f"^config.{name}: expected .*, found {value!r}", optimizer=adam)
        with mock.patch.object(adam.chained_optimizers[0], "config", replace(config)) as made_with:
            setattr(made_with, name, value)
            refused(f"optimizer.config.{name}: expected .*, found {value!r}", optimizer=adam)
    refused("expected DistributedDataParallel .* found GPTModel", model_chunks=[chunks[0].module])
    refused("a map for each of 1 model chunks, found 2", blocks=[BlockMap({}), BlockMap({})])
    refused("expected an entry for parameter 'embedding.word_emb", blocks=BlockMap({}))
    refused("arguments: expected none with optimizer=", optimizer=adam, config_overrides={})
    refused("preset: expected one of", preset="heads")
    layerwise = LayerWiseDistributedOptimizer(
        [FP32Optimizer(torch.optim.AdamW(chunks[0].parameters()), config, None)],
        config,
        ProcessGroupCollection.use_mpu_process_groups(),
        [None],
    )
    refused("optimizer: expected FP32Optimizer, .* found LayerWiseDist", optimizer=layerwise)
    chunks[0].module.strange = torch.nn.Parameter(torch.zeros(3, 4))
    refused("model: strict expects parameters of known role, found strange", strict=True)
    del chunks[0].module.strange
    run.train(0, 1)
    refused("found one that has been stepped or loaded", optimizer=adam)
    adam.chained_optimizers[0].optimizer.state.clear()
    blocks = infer_blocks(chunks[0].module).edited({"*.linear_fc1.weight": "whole"})
    assert megatron_adam_mini(config, chunks, optimizer=adam, blocks=blocks) is adam
    inner = adam.chained_optimizers[0].optimizer
    rules = [inner.layout(p).kind for p in inner.param_groups[0]["params"]]
    assert rules.count("whole") == MODEL["num_layers"]
    saved = adam.state_dict()
    for own in saved["state"].values():
        own["exp_avg"] = torch.ones_like(own["exp_avg"])
        del own["step"]
    with pytest.raises(ValueError, match="expected the step of moments that are not 0"):
        adam.load_state_dict(saved)
    saved["state"] = {0: {"momentum_buffer": torch.zeros(1)}}
    with pytest.raises(ValueError, match="expected exp_avg and exp_avg_sq of an Adam, found"):
        adam.load_state_dict(saved)
    with pytest.raises(ValueError, match="optimizer: expected an Adam to replace, found an Ad"):
        megatron_adam_mini(config, chunks, optimizer=adam)


CHECKS = [
    # ranks, TP, PP, EP
    ((1, 1, 1, 1), [check_alone, check_refusals]),
    (
        (2, 1, 1, 1),
        [
            check_dense,
            check_shards_that_cut_rows,
            check_loss_scaling,
            check_formats,
            check_adam,
        ],
    ),
    ((2, 2, 1, 1), [check_dense, check_other_blocks, check_saved_by_layers_that_are_cut]),
    ((2, 1, 2, 1), [check_dense, check_tied, check_interleaved_chunks]),
    ((2, 1, 1, 2), [check_experts]),
    ((4, 2, 1, 1), [check_other_blocks, check_resharding]),
    ((4, 1, 1, 1), [check_shards_that_cut_rows]),
    ((1, 1, 1, 1), [check_one_process_goes_on]),
]
SLOW = [
    ((1, 1, 1, 1), [check_alone]),
    ((2, 1, 1, 1), [check_formats, check_more_formats, check_adam]),
    ((2, 2, 1, 1), [check_resharding, check_more_resharding]),
    ((2, 1, 1, 2), [check_saved_by_experts]),
    ((4, 2, 1, 1), [check_dense, check_more_resharding]),
]


def check_id(world, check):
    ranks, tp, pp, ep = world
    dp = ranks // (tp * pp)
    return f"{check.__name__.removeprefix('check_')}-tp{tp}-pp{pp}-ep{ep}-dp{dp}"


def run(rank, folder, worlds):
    """Every check of every world this process belongs to; rank 0 notes those that passed."""
    torch.set_num_threads(1)
    with optimizer_on_cpu():
        for number, (world, checks) in enumerate(worlds):
            ranks, tp, pp, ep = world
            if rank >= ranks:
                continue
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous{number}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=120),
            )
            parallel_state.initialize_model_parallel(
                tp,
                pp,
                expert_model_parallel_size=ep,
                create_gloo_process_groups=check_more_formats in checks,
            )
            for check in checks:
                if rank == 0:
                    print(check_id(world, check), flush=True)
                check(Path(folder))
                dist.barrier()
                if rank == 0:
                    with open(f"{folder}/passed", "a") as notes:
                        notes.write(f"{check_id(world, check)}\n")
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
