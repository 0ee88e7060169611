"""What each tensor's rule is: written out by hand for a model of known sizes."""

from dataclasses import replace

import pytest

from engram_megatron.config import (
    AttentionConfig,
    EngramConfig,
    HyperConnectionConfig,
    ModelConfig,
)
from engram_megatron.optimizer.parameter_groups import MatrixSplit, TensorRule, describe_tensor, parameter_rules

MODEL = ModelConfig(
    hidden_size=64,
    attention=AttentionConfig(num_heads=4, kv_lora_rank=24, nope_head_dim=16, rope_head_dim=8, value_head_dim=12),
    mhc=HyperConnectionConfig(num_streams=3),
)
RULES = parameter_rules(MODEL, EngramConfig())
LAYER = "decoder.layers.5."


def _muon(*sizes: int, repeats: int = 1, per_rank: bool = False) -> TensorRule:
    split = MatrixSplit(sizes=sizes, repeats=repeats, per_rank=per_rank) if sizes else None
    return TensorRule(optimizer="muon", weight_decay=True, split=split)


DECAYED = TensorRule(optimizer="adam", weight_decay=True, by_rows=True)
VECTOR = TensorRule(optimizer="adam", weight_decay=False)
EXPECTED = {
    ("embedding.word_embeddings.weight", (128, 64)): DECAYED,
    ("output_layer.weight", (128, 64)): DECAYED,
    ("decoder.final_layernorm.weight", (64,)): VECTOR,
    (LAYER + "input_layernorm.weight", (64,)): VECTOR,
    (LAYER + "pre_mlp_layernorm.weight", (64,)): VECTOR,
    (LAYER + "self_attention.linear_q_proj.weight", (96, 64)): _muon(),
    (LAYER + "self_attention.linear_q_down_proj.weight", (32, 64)): _muon(),
    (LAYER + "self_attention.q_layernorm.weight", (32,)): VECTOR,
    (LAYER + "self_attention.linear_q_up_proj.weight", (96, 32)): _muon(),
    (LAYER + "self_attention.linear_kv_down_proj.weight", (32, 64)): _muon(24, 8),
    (LAYER + "self_attention.kv_layernorm.weight", (24,)): VECTOR,
    (LAYER + "self_attention.linear_kv_up_proj.weight", (112, 24)): _muon(16, 12, repeats=4),
    (LAYER + "self_attention.linear_proj.weight", (64, 48)): _muon(),
    (LAYER + "mlp.linear_fc1.weight", (80, 64)): _muon(40, 40, per_rank=True),
    (LAYER + "mlp.linear_fc2.weight", (64, 40)): _muon(),
    (LAYER + "mlp.router.weight", (8, 64)): _muon(),
    (LAYER + "mlp.experts.local_experts.7.linear_fc1.weight", (60, 64)): _muon(30, 30, per_rank=True),
    (LAYER + "mlp.experts.local_experts.7.linear_fc2.weight", (64, 30)): _muon(),
    (LAYER + "mlp.experts.weight1", (8, 60, 64)): _muon(30, 30, per_rank=True),
    (LAYER + "mlp.experts.weight2", (8, 64, 30)): _muon(),
    (LAYER + "mlp.shared_experts.linear_fc1.weight", (60, 64)): _muon(30, 30, per_rank=True),
    (LAYER + "mlp.shared_experts.linear_fc2.weight", (64, 30)): _muon(),
    (LAYER + "mhc_attention.mapping.weight", (15, 192)): _muon(3, 3, 9),
    (LAYER + "mhc_mlp.mapping.weight", (15, 192)): _muon(3, 3, 9),
    (LAYER + "mhc_attention.bias", (15,)): VECTOR,
    (LAYER + "mhc_mlp.alpha", (3,)): VECTOR,
    (LAYER + "engram.key_value.weight", (256, 48)): _muon(64, 64, 64, 64),
    (LAYER + "engram.key_value.bias", (256,)): VECTOR,
    (LAYER + "engram.norm_query.weight", (3, 64)): VECTOR,
    (LAYER + "engram.norm_key.weight", (3, 64)): VECTOR,
    (LAYER + "engram.norm_conv.weight", (3, 64)): VECTOR,
    (LAYER + "engram.short_conv.weight", (192, 1, 4)): VECTOR,
}


@pytest.mark.parametrize(("name", "shape"), EXPECTED)
def test_rule_of_every_tensor(name: str, shape: tuple[int, ...]) -> None:
    assert RULES.rule(name, shape) == EXPECTED[name, shape]
    assert RULES.rule(f"module.module.{name}", shape) == EXPECTED[name, shape]


@pytest.mark.parametrize(("name", "shape"), EXPECTED)
def test_description_says_what_the_rule_does(name: str, shape: tuple[int, ...]) -> None:
    rule, text = EXPECTED[name, shape], describe_tensor(name, shape)
    assert text.startswith("Muon" if rule.optimizer == "muon" else "Adam")
    assert ("no weight decay" in text) == (not rule.weight_decay)
    assert ("split" in text) == (rule.split is not None)


def test_description_reads_as_promised() -> None:
    assert describe_tensor(LAYER + "mlp.linear_fc1.weight", (80, 64)) == "Muon, split gate | up, weight decay"
    assert describe_tensor("decoder.final_layernorm.weight", (64,)) == "Adam, no weight decay"


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.mystery.weight", "output_layer.weight.extra", "weight"])
@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4)])
def test_unknown_matrix_is_an_error(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no optimizer rule for"):
        RULES.rule(name, shape)
    with pytest.raises(ValueError, match="no optimizer rule for"):
        describe_tensor(name, shape)


def test_parts_that_do_not_fill_the_matrix_are_an_error() -> None:
    with pytest.raises(AssertionError, match="33 rows"):
        RULES.rule(LAYER + "self_attention.linear_kv_down_proj.weight", (33, 64))


@pytest.mark.parametrize(
    ("engram", "rows", "sizes"),
    [
        (EngramConfig(multi_branch=False), 128, (64, 64)),
        (EngramConfig(gate=False), 64, (64,)),
    ],
)
def test_engram_variants_have_as_many_keys_as_they_use(engram: EngramConfig, rows: int, sizes: tuple[int, ...]) -> None:
    rule = parameter_rules(MODEL, engram).rule(LAYER + "engram.key_value.weight", (rows, 48))
    assert rule.split == MatrixSplit(sizes=sizes)


def test_blocks_of_tensor_parallel_ranks_follow_megatrons_layout() -> None:
    assert MatrixSplit(sizes=(8, 8), per_rank=True).blocks(4) == (4, (2, 2))
    assert replace(MatrixSplit(sizes=(8, 8)), repeats=3).blocks(4) == (3, (8, 8))
