"""Another format, and back: the same to the bit. What Megatron reads of ours is what our own loader gives."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from whole_checkpoint import flip_a_byte, model_config

from engram_checkpoints import backbone_writer, convert, file_journal, offline_writer
from engram_checkpoints.convert import plan_conversion
from engram_checkpoints.train_state import TrainState
from engram_megatron.errors import UsageError
from engram_megatron.layouts.checkpoint_contents import checkpoint_contents, first_difference

MIB = 1024**2
LAYOUTS = {
    "TP2xPP2xEP2": ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"),
    "PP2xVPP2": ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.expert=1"),
    "TP4": ("parallel.tensor=4", "parallel.expert=1"),
}


def converted(
    source: Path, target: Path, to: Any, *overrides: str, on_bytes: Callable[[int], None] | None = None
) -> Path:
    plan = plan_conversion(source, target, to, overrides, 64 * MIB)
    convert.convert(plan, lambda _total: None, on_bytes or (lambda _bytes: None))
    return target


def assert_same(ours: Path, theirs: Path) -> None:
    assert first_difference(checkpoint_contents(ours), checkpoint_contents(theirs)) is None


@pytest.mark.parametrize(
    ("to", "layout"),
    [
        ("torch_dist", ()),
        *(pytest.param("legacy", of, marks=[pytest.mark.slow] * (name == "TP4")) for name, of in LAYOUTS.items()),
    ],
    ids=["torch_dist", *LAYOUTS],
)
def test_there_and_back_is_the_same_to_the_bit(
    saved_checkpoint: Path, tmp_path: Path, to: Any, layout: tuple[str, ...]
) -> None:
    there = converted(saved_checkpoint, tmp_path / "there", to, *layout)
    before = TrainState.read(saved_checkpoint)
    one = {key: str(value).lower() for key, value in before.config["parallel"].items()}
    back = converted(there, tmp_path / "back", "engram", *(f"parallel.{key}={value}" for key, value in one.items()))
    assert_same(back, saved_checkpoint)
    assert TrainState.read(back) == before
    assert (there / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_other_blocks_hold_the_same_rows(saved_checkpoint: Path, tmp_path: Path) -> None:
    other = converted(saved_checkpoint, tmp_path / "other", "engram", "tables.block_rows=20")
    assert_same(other, saved_checkpoint)
    assert TrainState.read(other).config["tables"]["block_rows"] == 20
    assert len(list((other / "tables.zarr/last_step").glob("c.*"))) > len(
        list((saved_checkpoint / "tables.zarr/last_step").glob("c.*"))
    )


def _load_in_megatron(rank: int, world_size: int, folder: Path, ours: Path) -> tuple[str | None, dict[str, Any]]:
    """The first tensor that is another than in `ours`, and what is no tensor."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    tensors = {name.removeprefix("engram."): t for name, t in loaded.items() if isinstance(t, torch.Tensor)}
    wanted = checkpoint_contents(ours)
    del wanted["tables.description"], wanted["num_steps"]
    return first_difference(tensors, wanted), {
        name: value for name, value in loaded.items() if not isinstance(value, torch.Tensor)
    }


def test_megatron_loads_the_torch_dist_folder_tables_included(saved_checkpoint: Path, tmp_path: Path) -> None:
    there = converted(saved_checkpoint, tmp_path / "there", "torch_dist")
    ((different, common),) = run_ranks(_load_in_megatron, 1, there / "iter_0000002", saved_checkpoint)
    assert different is None
    assert (common["iteration"], common["optimizer"]["num_steps"]) == (2, 2)
    assert common["engram_megatron"]["train_state"]["hash_identity"] == {"seed": 0, "multipliers": [3, 5]}


def _legacy_against_our_loader(rank: int, world_size: int, config: Any, ours: Path, legacy: Path) -> list[str]:
    """What differs between a rank that loaded `ours` as a resume does, and what the rank's legacy files hold."""
    import numpy as np
    from megatron.core import parallel_state

    from engram_megatron.layouts.rank_run import SmallRun
    from engram_megatron.layouts.resume_case import load
    from engram_megatron.model.parameter_names import unwrapped

    run = SmallRun(config, rank, world_size)
    load(run, ours)
    parallel = config.parallel
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel.pipeline > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel.expert > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    content = torch.load(legacy / "iter_0000002" / name / "model_optim_rng.pt", weights_only=True)
    models = [content["model"]] if len(run.chunks) == 1 else [content[f"model{i}"] for i in range(len(run.chunks))]
    different = []
    for number, (chunk, model) in enumerate(zip(run.chunks, models, strict=True)):
        loaded = {key: value for key, value in unwrapped(chunk).state_dict().items()}
        assert loaded.keys() == model.keys(), loaded.keys() ^ model.keys()
        different += [key for key, value in loaded.items() if value is not None and not torch.equal(value, model[key])]
        with torch.no_grad():
            for tensor in unwrapped(chunk).parameters():
                tensor.zero_()
        unwrapped(chunk).load_state_dict(model, strict=True)
        assert number < parallel.virtual_pipeline
    before = {name: {k: v.clone() for k, v in s.items()} for name, s in run.optimizer.state_dict()["state"].items()}
    assert before.keys() == content["optimizer"]["state"].keys()
    for name, states in before.items():
        theirs = content["optimizer"]["state"][name]
        assert states.keys() == theirs.keys(), name
        different += [f"{key} of {name}" for key, value in states.items() if not torch.equal(value, theirs[key])]
    run.optimizer.load_state_dict(content["optimizer"])
    assert run.optimizer.num_steps == 2
    assert run.memory is not None
    shard = run.memory.shard
    rows = shard.exact(np.arange(shard.num_rows))
    for array, values in {"weight": rows.weight, "exp_avg": rows.exp_avg, "last_step": rows.last_step}.items():
        stored = torch.load(legacy / f"iter_0000002/tables/rank_{rank:05d}_{array}.pt", weights_only=True)
        different += [] if np.array_equal(stored.numpy(), values) else [f"rows' {array}"]
    return different


@pytest.mark.parametrize("layout", ["TP2xPP2xEP2", "PP2xVPP2", pytest.param("TP4", marks=pytest.mark.slow)])
def test_legacy_files_are_what_each_rank_holds(saved_checkpoint: Path, tmp_path: Path, layout: str) -> None:
    legacy = converted(saved_checkpoint, tmp_path / "legacy", "legacy", *LAYOUTS[layout])
    config = model_config(*LAYOUTS[layout])
    world_size = config.parallel.tensor * config.parallel.pipeline
    found = run_ranks(_legacy_against_our_loader, world_size, config, saved_checkpoint, legacy)
    assert found == [[]] * world_size
    assert len(list(legacy.glob("iter_0000002/mp_rank_*"))) == world_size


class Killed(BaseException):
    """In the place of a signal."""


@pytest.mark.parametrize("to", ["engram", pytest.param("torch_dist", marks=pytest.mark.slow), "legacy"])
def test_broken_off_conversion_goes_on_where_it_stopped(
    saved_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    """Broken off after a half, then after three quarters."""
    layout = LAYOUTS["TP2xPP2xEP2"]
    monkeypatch.setattr(file_journal.fcntl, "flock", lambda *_: None)  # this process lives on
    monkeypatch.setattr(file_journal, "_BATCH_BYTES", 1)
    monkeypatch.setattr(backbone_writer, "FILE_BYTES", 20_000)
    monkeypatch.setattr(offline_writer, "_UNIT_BYTES", 1)
    source = plan_conversion(saved_checkpoint, tmp_path / "there", to, layout, 64 * MIB).source
    read = type(source.backbone).read
    read_bytes = [0]

    def counted(*arguments: Any) -> torch.Tensor:
        values = read(*arguments)
        read_bytes[-1] += values.nbytes
        return values

    monkeypatch.setattr(type(source.backbone), "read", counted)
    straight = converted(saved_checkpoint, tmp_path / "straight", to, *layout)
    for share in (0.5, 0.75, None):
        read_bytes.append(0)
        done = [0]

        def on_bytes(num_bytes: int, share: float | None = share, done: list[int] = done) -> None:
            done[0] += num_bytes
            if share is not None and done[0] > share * source.num_bytes:
                raise Killed

        if share is None:
            converted(saved_checkpoint, tmp_path / "there", to, *layout)
        else:
            with pytest.raises(Killed):
                converted(saved_checkpoint, tmp_path / "there", to, *layout, on_bytes=on_bytes)
            (next((tmp_path / "there.partial").iterdir()) / "half_written").write_bytes(b"")
        assert (tmp_path / "there").exists() == (share is None)
    # Three tries from the beginning would read 2.25 times as much; what was half-written is read again.
    assert sum(read_bytes[1:]) < 1.6 * read_bytes[0], read_bytes
    monkeypatch.undo()
    back = [converted(path, tmp_path / f"{path.name}_back", "engram") for path in (tmp_path / "there", straight)]
    assert_same(*back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["straight", "straight_back", "there", "there_back"]
    assert not list((tmp_path / "there").rglob("half_written"))


def test_other_job_begins_anew_and_a_finished_one_is_taken(saved_checkpoint: Path, tmp_path: Path) -> None:
    def stop(_bytes: int) -> None:
        raise Killed

    target = tmp_path / "there"
    with pytest.raises(Killed):
        converted(saved_checkpoint, target, "torch_dist", on_bytes=stop)
    with (tmp_path / "there.journal").open() as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being written by another process"):
            converted(saved_checkpoint, target, "engram")
    converted(saved_checkpoint, target, "engram")
    assert_same(target, saved_checkpoint)
    job = plan_conversion(saved_checkpoint, target, "engram", (), 64 * MIB).job
    (tmp_path / "there.journal").write_text(json.dumps({"job": job}) + "\n")  # killed between the last two steps
    converted(saved_checkpoint, target, "engram")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def copy_of(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


@pytest.mark.parametrize("file", ["backbone/__0_0.distcp", "backbone/.metadata", "tables.zarr/weight/c.3.0",
    "tables.zarr/zarr.json", "train_state.json", "manifest.json"])  # fmt: skip
def test_flipped_byte_is_found_and_nothing_stands_at_the_target(
    saved_checkpoint: Path, tmp_path: Path, file: str
) -> None:
    damaged = copy_of(saved_checkpoint, tmp_path)
    flip_a_byte(damaged / file)
    with pytest.raises(UsageError, match=r"damaged|manifest") as error:
        converted(damaged, tmp_path / "there", "torch_dist")
    assert file in str(error.value).replace(": chunk ", "/")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(("to", "file"), [("torch_dist", "__0_0.distcp"), ("legacy", "mp_rank_00/model_optim_rng.pt"),
    ("legacy", "tables/rank_00000_exp_avg.pt")])  # fmt: skip
def test_flipped_byte_in_megatrons_formats_is_found(saved_checkpoint: Path, tmp_path: Path, to: Any, file: str) -> None:
    there = converted(saved_checkpoint, tmp_path / "there", to, "parallel.expert=1")
    flip_a_byte(there / "iter_0000002" / file)
    with pytest.raises(UsageError, match=f"{file} is damaged"):
        converted(there, tmp_path / "back", "engram")


def test_what_cannot_be_converted_is_told_in_one_line(saved_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    incomplete = copy_of(saved_checkpoint, tmp_path)
    (incomplete / "COMPLETE").unlink()
    target = tmp_path / "target"
    for source, to, overrides, told in [
        (tmp_path / "empty", "engram", (), "is no checkpoint"),
        (tmp_path / "nothing", "engram", (), "is no checkpoint"),
        (incomplete, "engram", (), "is not a complete checkpoint"),
        (saved_checkpoint, "engram", ("tables.blockrows=2",), "did you mean 'tables.block_rows'"),
        (saved_checkpoint, "engram", ("training.num_steps=3",), "training.num_steps cannot be set"),
        (saved_checkpoint, "legacy", ("parallel.tensor=3",), "not divisible by parallel.tensor = 3"),
        (saved_checkpoint, "legacy", ("parallel.expert=3",), "not divisible by parallel.expert = 3"),
        (saved_checkpoint, "legacy", ("parallel.pipeline=5",), "exceeds model.num_layers"),
    ]:
        with pytest.raises(UsageError, match=told) as error:
            converted(source, target, to, *overrides)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"--memory-gib is 0.00; give more, or set a smaller tables.block_rows"):
        plan_conversion(saved_checkpoint, target, "engram", ("tables.block_rows=4096",), MIB // 4)
    assert not target.exists()
    target.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        converted(saved_checkpoint, target, "engram")
