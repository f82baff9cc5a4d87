"""Megatron-core with Adam-mini, a policy loss on cut logits, monitors and a length-triggered rate.

    torchrun --nproc-per-node 2 examples/megatron_gpt.py 2    # tensor parallel over 2

A tiny GPTModel learns to count upwards, by the policy loss with an advantage of 1 for each token.
"""

import os
import sys

import torch
import torch.distributed as dist
from megatron.core import distributed, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from trimtab.integrations import megatron
from trimtab.stability import ClipEntropyMonitor, GradientNormMonitor, StabilityWatch, reinforce

VOCAB, ROWS, LENGTH, STEPS = 32, 16, 8, 25
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=int(sys.argv[1]))
model_parallel_cuda_manual_seed(0)
torch.manual_seed(0)
config = TransformerConfig(
    num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True,
    tensor_model_parallel_size=int(sys.argv[1]), hidden_dropout=0.0, attention_dropout=0.0,
    gradient_accumulation_fusion=False, calculate_per_token_loss=True,
)  # fmt: skip
model = GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH).cuda()
cut = distributed.DistributedDataParallelConfig(use_distributed_optimizer=True)
model = distributed.DistributedDataParallel(config, cut, model)
config.finalize_model_grads_func = distributed.finalize_model_grads
watch = StabilityWatch([GradientNormMonitor(), ClipEntropyMonitor()])
monitors = megatron.MegatronMonitors(config, watch)
rates = OptimizerConfig(lr=3e-3, min_lr=3e-4, use_distributed_optimizer=True)
optimizer = megatron.megatron_adam_mini(rates, [model])  # for get_megatron_optimizer
decay = (0.0, 3e-3, 3e-4, 2, 1000, "cosine", 0.01, 0.01, 1000, "constant")
schedule = megatron.length_triggered(OptimizerParamScheduler(optimizer, *decay), max_length=512)


def forward_step(data, model):
    counted = (next(data) + torch.arange(LENGTH + 1, device="cuda")) % VOCAB
    tokens, labels = counted[:, :-1], counted[:, 1:]
    places = torch.arange(LENGTH, device="cuda").expand_as(tokens)
    hidden = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device="cuda").triu(1)
    mask, advantages = torch.ones_like(tokens, dtype=torch.bool), torch.ones(tokens.shape).cuda()

    def loss(stats):
        monitors.record(stats, mask, advantages=advantages)
        return reinforce(stats.logp, advantages, mask=mask).sum()

    logits, mean = model(tokens, places, hidden), "token_mean"
    return logits, megatron.policy_loss_function(model, labels, mask, loss, reduction=mean)


for step in range(STEPS):
    model.zero_grad_buffer()
    starts = iter(torch.randint(VOCAB, (2, ROWS, 1), device="cuda"))  # two micro-batches
    logged = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=starts, model=model, num_microbatches=2,
        seq_length=LENGTH, micro_batch_size=ROWS, forward_only=False,
    )  # fmt: skip
    _, norm, _ = optimizer.step()
    verdict = monitors.judge({"grad_norm": norm})
    schedule.observe(mean_length=LENGTH)
    schedule.step(1)
    if dist.get_rank() == 0 and step % 8 == 0:
        loss = sum(float(x["loss"]) for x in logged) / (2 * ROWS * LENGTH)
        print(f"step {step}: loss {loss:.3f}, {verdict.reading.state}", flush=True)
dist.destroy_process_group()
