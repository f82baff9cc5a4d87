"""infer_blocks on models that peft, megatron-core or FSDP2 changed or made."""

import logging

import pytest
import torch
import torch.distributed as dist
from architectures import blocks_behind, tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from trimtab.optim import AdamMini, BlockLayout
from trimtab.optim.blocks import infer_blocks


def with_lora(name, targets, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny(name), peft.LoraConfig(r=4, target_modules=targets, **options), "adapter"
    )


def rules(blocks, ending):
    return {entry.layout.rule for name, entry in blocks.items() if name.endswith(ending)}


@pytest.mark.parametrize("preset", ["rows", "paper", "snr"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora(preset, dora):
    model = with_lora("Llama", ["q_proj", "v_proj", "down_proj"], use_dora=dora)
    blocks = infer_blocks(model, preset, strict=True)
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    assert rules(blocks, "lora_A.adapter.weight") == rules(blocks, "lora_B.adapter.weight")
    assert rules(blocks, "lora_A.adapter.weight") == {"row"}
    assert rules(blocks, "q_proj.base_layer.weight") == {"12 rows" if preset == "paper" else "row"}
    by_input = {"column" if preset == "snr" else "row"}
    assert rules(blocks, "v_proj.base_layer.weight") == by_input
    assert rules(blocks, "down_proj.base_layer.weight") == by_input
    assert rules(blocks, "lora_magnitude_vector.adapter.weight") == (
        {"elementwise"} if dora else set()
    )


def test_lora_of_fused_transposed_and_embedding_layers():
    blocks = infer_blocks(with_lora("GPT-2", ["c_attn", "wte"]), "paper", strict=True)
    assert rules(blocks, "c_attn.base_layer.weight") == {"8 x 8 + 32 x 1 columns"}
    assert rules(blocks, "c_attn.lora_A.adapter.weight") == {"row"}
    tokens = next(e.layout for n, e in blocks.items() if n.endswith("lora_embedding_A.adapter"))
    assert tokens == BlockLayout("column", (4, 64))  # stored rank x tokens
    assert rules(blocks, "lora_embedding_B.adapter") == {"row"}


def test_trained_copies_have_the_role_of_the_original():
    model = with_lora("Llama", ["v_proj"], modules_to_save=["q_proj", "lm_head"])
    blocks = infer_blocks(model, "paper", strict=True)
    assert rules(blocks, "q_proj.original_module.weight") == {"12 rows"}
    assert rules(blocks, "q_proj.modules_to_save.adapter.weight") == {"12 rows"}
    assert rules(blocks, "lm_head.modules_to_save.adapter.weight") == {"row"}


def test_adalora_keeps_bare_parameters():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    blocks = infer_blocks(peft.get_peft_model(tiny("Llama"), config), strict=True)
    assert rules(blocks, "lora_A.default") == rules(blocks, "lora_B.default") == {"row"}
    assert rules(blocks, "lora_E.default") == {"elementwise"}  # r x 1


@pytest.fixture
def one_process():
    """Builds process groups of any size in which this process is rank 0 and nobody else is."""

    def start(size):
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("preset", ["rows", "paper", "snr"])
def test_sharded_parameters_count_with_their_global_shape(preset, one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    one_process(3)  # heads of 12 rows are cut by the shards: 48 and 24 rows in 3
    mesh = init_device_mesh("cpu", (3,))
    for name in ("Llama", "GPT-2", "Mixtral"):
        want = infer_blocks(tiny(name), preset, strict=True)
        model = tiny(name)
        for layer in (*model.modules(),):
            if isinstance(layer, nn.ModuleList):
                for block in layer:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert infer_blocks(model, preset, strict=True) == want


class Watch(nn.Module):
    """A core attention that keeps what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, **kwargs):
        self.query, self.key, self.value = query, key, value
        mixed = value.mean(0, keepdim=True).expand(query.shape[0], -1, -1, -1)
        mixed = mixed.repeat_interleave(query.shape[2] // value.shape[2], 2)
        return mixed.flatten(2)


@pytest.fixture
def gpt(one_process, monkeypatch):
    """Builds rank 0's shard of a Megatron GPT: `gpt(tensor parallel size, **config)`."""
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(multi_latent_attention, "TELinear", type("TELinear", (), {}))  # 0.16.1

    def build(size=1, **config):
        one_process(size)
        parallel_state.initialize_model_parallel(size, create_gloo_process_groups=False)
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        latent = "kv_lora_rank" in config
        defaults = dict(
            num_layers=1, hidden_size=32, num_attention_heads=8, num_query_groups=4, kv_channels=6,
            ffn_hidden_size=40, gated_linear_unit=True, activation_func=nn.functional.silu,
            add_bias_linear=False, normalization="RMSNorm", hidden_dropout=0.0,
            attention_dropout=0.0, use_cpu_initialization=True, tensor_model_parallel_size=size,
            gradient_accumulation_fusion=False, masked_softmax_fusion=False,
            bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        )  # fmt: skip
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=config.get("num_moe_experts"),
            normalization="RMSNorm",
            multi_latent_attention=latent,
        )
        spec.submodules.self_attention.submodules.core_attention = Watch
        made = (MLATransformerConfig if latent else TransformerConfig)(**defaults | config)
        rotary = "none" if latent else "rope"
        return GPTModel(made, spec, 64, 16, position_embedding_type=rotary, parallel_output=True)

    with torch.compiler.set_stance("force_eager"):  # compiling a gate takes ten seconds
        yield build
    parallel_state.destroy_model_parallel()


def forward(model):
    tokens = torch.tensor([[3, 9, 27, 17]])
    mask = torch.tril(torch.ones(1, 1, 4, 4)) < 0.5
    model.eval()(tokens, torch.arange(4)[None], mask)
    return model.decoder.layers[0].self_attention


PREFIX = "decoder.layers.0."


@pytest.mark.parametrize(
    ("size", "config", "rule"),
    [
        (1, dict(), "3 x 6 + 6 x 1 rows"),  # 2 queries and a key, then values, in each of 4 groups
        (2, dict(), "3 x 6 + 6 x 1 rows"),  # 2 groups of the 4
        (1, dict(num_query_groups=8), "2 x 6 + 6 x 1 rows"),
        (1, dict(attention_output_gate=True), "2 x 6 + 12 x 1 + 1 x 6 + 6 x 1 rows"),
        (2, dict(attention_output_gate=True), "2 x 6 + 12 x 1 + 1 x 6 + 6 x 1 rows"),
    ],
    ids=["groups", "groups-TP2", "heads", "gated", "gated-TP2"],
)
def test_megatron_heads(gpt, size, config, rule):
    torch.manual_seed(0)
    model = gpt(size, **config)
    layout = infer_blocks(model, "paper", strict=True)[
        PREFIX + "self_attention.linear_qkv.weight"
    ].layout
    assert layout.rule == rule
    attention = forward(model)
    core, weight = attention.core_attention, attention.linear_qkv.weight
    claimed = set()
    for states in (core.query, core.key):  # [T, B, H, D]
        found = blocks_behind(states.unbind(2), weight, layout)
        assert len(set(found)) == states.shape[2]
        claimed |= set(found)
    rest = set(range(layout.n_blocks)) - claimed
    assert all(layout.block_lengths()[b] == layout.unit_length for b in rest)


def test_clipping_is_refused_where_megatron_has_experts_on_other_ranks(gpt, monkeypatch):
    from megatron.core import parallel_state

    model = gpt(2)
    AdamMini.for_model(model, max_grad_norm=1.0)
    monkeypatch.setattr(parallel_state, "get_expert_model_parallel_world_size", lambda: 2)
    AdamMini.for_model(model)
    with pytest.raises(ValueError, match=r"max_grad_norm, .* pipeline stages or experts on other"):
        AdamMini.for_model(model, max_grad_norm=1.0)


def test_without_tensor_parallelism_megatron_cuts_nothing(gpt):
    AdamMini.for_model(gpt(1))  # whose weights carry the same marks


def test_a_megatron_shard_with_a_fraction_of_a_group_is_cut_by_row(gpt, caplog):
    model = gpt(4, num_query_groups=2)  # 4 queries, a key, a value: 1.5 heads a rank
    name = PREFIX + "self_attention.linear_qkv.weight"
    with caplog.at_level(logging.WARNING):
        layout, reason = infer_blocks(model, "paper")[name]
    assert layout.plain and "not whole groups of heads of SelfAttention" in reason
    assert len(caplog.records) == 1 and name in caplog.text
    with pytest.raises(ValueError, match="linear_qkv"):
        infer_blocks(model, "paper", strict=True)
    infer_blocks(model, "snr", strict=True)


@pytest.mark.parametrize("rank", [dict(q_lora_rank=12), dict(q_lora_rank=None)])
def test_megatron_latent_attention(gpt, rank):
    torch.manual_seed(0)
    sizes = dict(kv_lora_rank=10, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=5)
    model = gpt(**sizes, **rank, num_query_groups=8, rope_type="rope")
    blocks = infer_blocks(model, "paper", strict=True)
    attention = forward(model)
    core = attention.core_attention
    query = "linear_q_up_proj" if rank["q_lora_rank"] else "linear_q_proj"
    for states, projection in ((core.query, query), (core.key, "linear_kv_up_proj")):
        layout = blocks[f"{PREFIX}self_attention.{projection}.weight"].layout
        weight = getattr(attention, projection).weight
        assert len(blocks_behind(states.unbind(2), weight, layout)) == 8
    layout = blocks[PREFIX + "self_attention.linear_kv_down_proj.weight"].layout
    assert layout.rule == "10 x 1 + 1 x 4 rows"


@pytest.mark.parametrize("size", [1, 2])
def test_the_other_megatron_layers(gpt, size):
    blocks = infer_blocks(gpt(size), "snr", strict=True)
    assert {name: (entry.layout.rule, entry.layout.shape) for name, entry in blocks.items()} == {
        "embedding.word_embeddings.weight": ("row", (64 // size, 32)),
        PREFIX + "input_layernorm.weight": ("elementwise", (32,)),
        PREFIX + "self_attention.linear_proj.weight": ("column", (32, 48 // size)),
        PREFIX + "self_attention.linear_qkv.weight": ("row", (96 // size, 32)),
        PREFIX + "pre_mlp_layernorm.weight": ("elementwise", (32,)),
        PREFIX + "mlp.linear_fc1.weight": ("row", (80 // size, 32)),
        PREFIX + "mlp.linear_fc2.weight": ("column", (32, 40 // size)),
        "decoder.final_layernorm.weight": ("elementwise", (32,)),
        "output_layer.weight": ("row", (64 // size, 32)),
    }


def test_megatron_experts(gpt):
    blocks = infer_blocks(gpt(num_moe_experts=2, moe_ffn_hidden_size=16), "snr", strict=True)
    assert rules(blocks, "router.weight") == rules(blocks, "linear_fc1.weight") == {"row"}
    assert rules(blocks, "linear_fc2.weight") == {"column"}


class GroupedMLP(nn.Module):
    """As megatron-core's, which asks for a CUDA library: 2 experts, 3 inputs, 4 neurons."""

    def __init__(self):
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(3, 2 * 4))
        self.weight2 = nn.Parameter(torch.randn(2 * 4, 3))


def test_grouped_experts_of_megatron():
    module = GroupedMLP()
    for preset in ("rows", "paper", "snr"):
        blocks = infer_blocks(module, preset, strict=True)
        assert blocks["weight1"].layout.kind == "elementwise"  # viewed as [2, 3, 4]
        assert "strides" in blocks["weight1"].reason
        hidden = torch.eye(4)[2].expand(2, 1, 4)  # the third neuron of both experts
        out = torch.bmm(hidden, module.weight2.view(2, 4, 3))
        (gradient,) = torch.autograd.grad(out[1].sum(), module.weight2)
        index = blocks["weight2"].layout.index()
        assert torch.equal(gradient != 0, index == 4 + 2)  # one input neuron of expert 1


# Edits that must turn this file red:
#   block_storage.py:
#   1. "lora_embedding_A": Storage("column", ...) -> Storage("row", ...)
#   2. _BY_CLASS: drop "ColumnParallelLinear"
#   block_roles.py:
#   3. _grouped_gated_or_not: q._replace(role="gate") after k instead of before it
#   4. _QUERY_HEADS: "num_attention_heads_per_partition" removed (TP: the counts of the config)
#   5. _WRAPPED: "modules_to_save" removed
