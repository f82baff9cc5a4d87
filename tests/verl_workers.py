"""What test_integration_verl.py runs in two processes: verl's own FSDP engine, on CPUs and gloo.

verl has no platform of CPUs, but takes one. Its engine then builds, shards, trains, clips,
schedules, saves and loads as on GPUs.
"""

import os
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from tiny_models import VOCAB

RANKS, ROWS, PROMPT, RESPONSE = 2, 4, 3, 5
STEPS, SAVED = 5, 3  # the engine of the last steps is another one, which loads
LR, WARMUP, MIN_RATIO, CLIP = 4e-4, 2, 0.1, 0.05
TRUST = dict(max_threshold=0.3, mean_threshold=0.3)  # rejects some in the last steps
OPTIMIZER = dict(lr=LR, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6)


def batch():
    """[RANKS * ROWS, ...] tokens, masks, advantages, and log-probs of a policy near the model."""
    g = torch.Generator().manual_seed(5)
    rows = RANKS * ROWS
    ids = torch.randint(VOCAB, (rows, PROMPT + RESPONSE), generator=g)
    lengths = torch.randint(1, RESPONSE + 1, (rows, 1), generator=g)
    mask = (torch.arange(RESPONSE) < lengths).long()
    attention = torch.cat([torch.ones(rows, PROMPT, dtype=torch.int64), mask], 1)
    advantages = torch.randn(rows, RESPONSE, generator=g) * mask
    return ids * attention, attention, mask, advantages


def response_logp(model, ids, attention):
    logits = model(input_ids=ids, attention_mask=attention).logits.float()
    logp = logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    return logp.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)


def cpu_platform():
    """verl's interface of a device for CPUs."""
    from verl.plugin.platform import platform_manager
    from verl.plugin.platform.platform_base import PlatformBase

    answers = dict(
        is_available=True, current_device=torch.device("cpu"), device_count=1, set_device=None,
        synchronize=None, manual_seed=None, manual_seed_all=None, set_allocator_settings=None,
        empty_cache=None, get_device_capability=(None, None), communication_backend_name="gloo",
        visible_devices_envvar="NO_DEVICES", nvtx_range=nullcontext(), profiler_start=None,
        profiler_stop=None, ray_resource_name="CPU", ray_noset_envvars=[], is_ipc_supported=False,
        cudart=None,
    )  # fmt: skip
    methods = {name: lambda self, *_, x=x: x for name, x in answers.items()}
    names = dict(device_name="cpu", vendor_name="cpu", device_module=torch.cpu)
    return platform_manager, type("PlatformCPU", (PlatformBase,), methods | names)


def engine(folder):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    model = HFModelConfig(
        path=f"{folder}/model",
        external_lib="trimtab.integrations.verl",
        load_tokenizer=False,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    dtypes = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    sharding = FSDPEngineConfig(strategy="fsdp2", mixed_precision=dtypes, use_torch_compile=False)
    optimizer = FSDPOptimizerConfig(
        optimizer_impl="trimtab.integrations.verl",
        optimizer="adam_mini",
        override_optimizer_config={"eps": OPTIMIZER["eps"]},
        lr_scheduler_type="cosine",
        lr_warmup_steps=WARMUP,
        min_lr_ratio=MIN_RATIO,
        total_training_steps=STEPS,
        clip_grad=CLIP,
        **{name: x for name, x in OPTIMIZER.items() if name != "eps"},
    )
    made = FSDPEngineWithLMHead(model, sharding, optimizer, CheckpointConfig())
    made.initialize()
    return made


def refusal_of_fsdp1():
    """verl's own wrapping by FSDP1 needs a GPU, its optimizer does not."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from verl.workers.config import FSDPOptimizerConfig
    from verl.workers.config.optimizer import build_optimizer

    config = FSDPOptimizerConfig(
        optimizer_impl="trimtab.integrations.verl", optimizer="adam_mini", lr=LR
    )
    model = torch.nn.Sequential(FullyShardedDataParallel(torch.nn.Linear(3, 3), device_id="cpu"))
    try:
        build_optimizer(model.parameters(), config)
    except ValueError as error:
        return str(error)


def actor():
    from verl.workers.config import ActorConfig

    from trimtab.integrations.verl import TrustRegionPolicyLossConfig

    loss = TrustRegionPolicyLossConfig(loss_mode="trimtab_trust_region", **TRUST)
    return ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, policy_loss=loss)


def part(rank, old_logp):
    """This rank's rows as the trainer hands them to the engine."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    ids, attention, mask, advantages = (x[rows].clone() for x in batch())
    data = TensorDict(
        {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": torch.arange(ids.shape[1]).repeat(ROWS, 1),
            "response_mask": mask,
            "prompts": ids[:, :PROMPT].clone(),
            "responses": ids[:, PROMPT:].clone(),
            "old_log_probs": old_logp[rows].clone(),
            "advantages": advantages,
        },
        batch_size=ROWS,
    )
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(
        data, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2,
        global_batch_size=RANKS * ROWS, temperature=1.0, use_fused_kernels=False,
    )  # fmt: skip
    return data


def run(rank, folder, old_logp):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    platform_manager, platform = cpu_platform()
    platform_manager.set_platform(platform())
    # what verl asks of a device's module, and torch.cpu has not
    torch.cpu.empty_cache = lambda: None
    torch.cpu.get_rng_state, torch.cpu.set_rng_state = torch.get_rng_state, torch.set_rng_state
    from verl.models.transformers import monkey_patch
    from verl.workers.utils.losses import ppo_loss

    # verl looks for a value head that trl, which other tests need, has dropped since
    monkey_patch.is_trl_available = lambda: False
    found = {"metrics": [], "refused": refusal_of_fsdp1()}
    for steps in (SAVED, STEPS - SAVED):
        trainer = engine(folder)
        if found["metrics"]:
            trainer.load_checkpoint(f"{folder}/checkpoint", del_local_after_load=False)
        for _ in range(steps):
            with trainer.train_mode():
                output = trainer.train_batch(part(rank, old_logp), partial(ppo_loss, actor()))
            output["metrics"]["lr"] = trainer.optimizer.param_groups[0]["lr"]
            found["metrics"].append(output["metrics"])
            trainer.lr_scheduler_step()
        trainer.save_checkpoint(f"{folder}/checkpoint")
    found["parameters"] = {
        name: param.full_tensor().detach() for name, param in trainer.module.named_parameters()
    }
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
