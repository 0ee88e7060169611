"""The dry run: every preset, the paper's numbers in the text, and nothing heavy imported."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from engram_megatron.errors import UsageError
from engram_megatron.model.counts import tensor_specs
from engram_megatron.overrides import apply_overrides
from engram_megatron.presets import preset, preset_names
from engram_megatron.training.plan import describe

PAPER = {
    "dense_4b": ("4.134 B", "3.803 B"),
    "moe_27b": ("26.717 B", "3.808 B"),
    "engram_27b": ("26.726 B", "3.840 B", "5.792 B", "74.35%"),
    "engram_40b": ("39.468 B", "3.840 B", "18.534 B", "47.49%"),
}


def _section(text: str, title: str) -> list[str]:
    """Lines of one section, without its underlined title."""
    body = text.split(f"{title}\n{'-' * len(title)}\n")[1]
    return body.split("\n\n")[0].strip().splitlines()


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan(name: str) -> None:
    text = describe(preset(name), 2)
    for number in PAPER.get(name, ()):
        assert number in text
    assert len({len(line) for line in _section(text, "FLOPs per token")[:-1]}) == 1, "columns are not aligned"
    assert ("Host tables" in text) == (preset(name).engram is not None)


def test_configuration_section_sets_the_same_config_again() -> None:
    changed = apply_overrides(preset("engram_27b"), ["engram.layer_numbers=2,3", "model.attention.query_lora_rank=512"])
    lines = _section(describe(changed, 1), "Configuration")
    filled = [line for line in lines if not line.endswith("= ")]
    assert apply_overrides(preset("engram_tiny"), filled) == changed


def _expand(name: str) -> list[str]:
    """The names that a collapsed name like a.{0..2,5}.b stands for."""
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    numbers: list[int] = []
    for run in match[1].split(","):
        first, _, last = run.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return [full for number in numbers for full in _expand(name.replace(match[0], str(number), 1))]


def test_optimizer_section_names_every_tensor_once() -> None:
    config = preset("engram_27b")
    names = [line.split()[0] for line in _section(describe(config, 1), "Optimizer of every tensor")]
    listed = [full for name in names for full in _expand(name) if not full.endswith("expert_bias")]
    assert sorted(listed) == sorted(spec.name for spec in tensor_specs(config))
    assert len(names) < 40  # for people


def test_optimizers_are_those_of_the_paper() -> None:
    lines = _section(describe(preset("engram_27b"), 1), "Optimizer of every tensor")
    update = {line.split()[0]: re.split(r"\]\s+", line)[1] for line in lines}
    assert update["embedding.word_embeddings.weight"].startswith("Adam")
    assert update["decoder.layers.{0..29}.self_attention.linear_proj.weight"].startswith("Muon")
    assert update["decoder.layers.{1,14}.engram.key_value.weight"].startswith("Muon")
    assert update["engram.tables"] == "row Adam, learning rate x 5, no weight decay"


def test_layout_shows_one_column_per_stage_and_names_its_traffic() -> None:
    overrides = ["parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=5"]
    text = describe(apply_overrides(preset("engram_27b"), overrides), 80)
    assert "tensor 2 x pipeline 2 x context 1 x data 20" in text
    assert _section(text, "Memory per rank")[0].split() == ["pipeline", "rank", "0", "pipeline", "rank", "1"]
    traffic = "\n".join(_section(text, "Bytes that one rank sends per step"))
    for kind in ("expert all-to-all (even routing)", "activations over tensor ranks", "residual streams", "table rows"):
        assert kind in traffic
    assert "context" not in traffic  # a kind that the layout does not have


def test_tables_on_nvme_are_counted_on_the_disk_and_their_hot_rows_in_memory() -> None:
    overrides = ["tables.placement=nvme", "tables.nvme_dir=/data", "tables.hot_fraction=0.1"]
    text = describe(apply_overrides(preset("engram_27b"), overrides), 8)
    # 72,404,232 rows of 960 bytes, 69.5e9; a tenth of them with 13 bytes more and 9 bytes for each, 7.70e9
    assert "Host tables of the whole job: 7.18 GiB; on NVMe: 64.80 GiB." in text
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in _section(text, "Memory per rank")}
    assert lines["host tables with moments"] == "0.90 GiB"
    assert lines["tables on NVMe with moments"] == "8.10 GiB"
    assert "tables on NVMe" not in describe(preset("engram_27b"), 8)


def test_pipeline_section_shows_every_chunk_and_a_layout_that_can_be_configured() -> None:
    config = apply_overrides(preset("engram_27b"), ["parallel.pipeline=2", "parallel.virtual_pipeline=2"])
    lines = _section(describe(config, 2), "Pipeline")
    chunks = [line.split() for line in lines[2:6]]
    assert [chunk[:2] for chunk in chunks] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert chunks[0][2].startswith("1..")
    assert chunks[3][2].endswith("..30")
    assert sorted(number for chunk in chunks for number in chunk[3].split(",")) == ["-", "-", "15", "2"]
    assert "100.0%" in {chunk[5] for chunk in chunks}
    again = apply_overrides(config, [lines[0].replace(" ", "")])
    assert _section(describe(again, 2), "Pipeline") == lines


def test_many_stages_show_the_most_loaded_one() -> None:
    text = describe(apply_overrides(preset("engram_27b"), ["parallel.pipeline=15"]), 15)
    assert _section(text, "Memory per rank")[0].split() == ["pipeline", "rank", "0"]  # it keeps 15 microbatches


def test_impossible_layout_is_refused() -> None:
    with pytest.raises(UsageError, match="not divisible by expert = 2"):
        describe(apply_overrides(preset("engram_tiny"), ["parallel.expert=2"]), 1)


def test_dry_run_imports_neither_torch_nor_megatron() -> None:
    """A plan is asked for on login nodes; torch alone would cost seconds and gigabytes of address space."""
    program = (
        "import sys; from engram_megatron.presets import preset; from engram_megatron.training.plan import describe; "
        "describe(preset('engram_40b'), 64); print(sorted({'torch', 'megatron', 'numba'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("override", ["model.moe=none", "model.moe.num_leading_dense_layers=4", "engram=none"])
def test_plan_of_a_model_without_a_sparse_ratio(override: str) -> None:
    assert "sparse ratio" not in describe(apply_overrides(preset("engram_tiny"), [override]), 2)


def test_plan_of_a_model_without_leading_dense_layers() -> None:
    assert "sparse ratio" in describe(
        apply_overrides(preset("engram_tiny"), ["model.moe.num_leading_dense_layers=0"]), 2
    )
