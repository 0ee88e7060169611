"""launch/upgrade.py: what it makes is what a run starts from; mistakes cost one line and write nothing."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, build_tiny_corpus, files_under, tiny_config

from engram_checkpoints.offline_writer import OfflineWriter
from engram_checkpoints.tensor_source import TensorInfo
from engram_checkpoints.train_state import TrainState
from engram_data.corpus import Corpus
from engram_megatron.overrides import to_dict
from engram_megatron.training.preflight import open_inputs

PROGRAM = Path(__file__).parents[2] / "launch/upgrade.py"
ROUTER = "decoder.layers.1.mlp.router."


def _checkpoint(folder: Path, corpus: Path, *overrides: str) -> Path:
    """A checkpoint of a model without Engram, as far as an upgrade looks at it."""
    writer = OfflineWriter(folder)
    shapes = {"embedding.word_embeddings.weight": (1024, 64), f"{ROUTER}weight": (4, 64), f"{ROUTER}expert_bias": (4,)}
    for name, shape in shapes.items():
        writer.backbone.add_rows(name, TensorInfo(shape, torch.float32), slice(None), torch.randn(shape))
    state = TrainState(
        step=3,
        tokens_seen=9,
        world_size=2,
        corpus_fingerprint="",
        tokenizer_sha256=Corpus.open(corpus, "train").tokenizer.sha256,
        hash_identity=None,
        config=to_dict(tiny_config(corpus, folder, "engram=none", *overrides)),
    )
    writer.finish(state, 3)
    return folder


class Program:
    """Runs the program with `TINY` in this process; returns (exit code, output, errors)."""

    def __init__(self, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.corpus, self.monkeypatch, self.capfd = corpus, monkeypatch, capfd

    def __call__(
        self, source: Path, target: Path, *arguments: str, preset: str = "engram_tiny"
    ) -> tuple[int, str, str]:
        command = [str(source), str(target), "engram_tiny", *TINY, f"data.corpus={self.corpus}", *arguments]
        self.monkeypatch.setattr("sys.argv", [str(PROGRAM), *command])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, *self.capfd.readouterr()


@pytest.fixture
def program(tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Program:
    return Program(tiny_corpus, monkeypatch, capfd)


@pytest.fixture(scope="module")
def moe(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("moe") / "step_00000003", tiny_corpus)


def test_a_run_may_start_from_what_it_makes(program: Program, moe: Path, tmp_path: Path) -> None:
    """Engram is added; then its tables grow and an expert goes."""
    code, output, errors = program(moe, tmp_path / "added")
    assert (code, errors) == (0, "")
    assert "start with   python launch/train.py engram_tiny" in output
    assert f"checkpoint.init_from={tmp_path / 'added'}" in output
    changes = ["engram.rows_per_head=1021", "model.moe.num_experts=3"]
    code, output, errors = program(tmp_path / "added", tmp_path / "grown", *changes, "--memory=0")
    assert (code, errors) == (0, "")
    for name, overrides in (("added", []), ("grown", changes)):
        init = f"checkpoint.init_from={tmp_path / name}"
        config = tiny_config(program.corpus, tmp_path / "run", "parallel.expert=1", init, *overrides)
        open_inputs(config, 2, resume=False)  # raises where a run may not
        state = TrainState.read(tmp_path / name)
        assert (state.step, state.tokens_seen) == (0, 0)
        assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["engram.rows_per_hed=1"], ["'engram.rows_per_hed'", "did you mean 'engram.rows_per_head'"]),
        (["model.norm_eps=1e-6"], ["model.norm_eps = 1e-06 is 1e-20 in", "give the source's value"]),
        (["model.moe=none"], ["model.moe", "give the source's value"]),
        (["model.moe.num_experts=5"], ["model.moe.num_experts = 5 is more than the 4 of", "not added"]),
        (["model.moe.num_experts=1"], ["model.moe.top_k = 2", "num_experts = 1"]),
        (["engram=none"], ["holds this model already", "checkpoint.init_from="]),
        (["--experts=kept.json"], ["--experts kept.json", "model.moe.num_experts below"]),
        (["model.moe.num_experts=3", "--experts=/no/such/file"], ["/no/such/file cannot be read as JSON"]),
        (["data.corpus="], ["data.corpus is not set"]),
        (["data.corpus=/no/such/corpus"], ["no corpus at /no/such/corpus"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_wrong_arguments(program: Program, moe: Path, tmp_path: Path, arguments: list[str], told: list[str]) -> None:
    _refused(program, moe, tmp_path, told, *arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["engram.memory_dim=64"], ["engram.memory_dim = 64 is 32 in", "has Engram already"]),
        (["engram.layer_numbers=1"], ["engram.layer_numbers = 1 is 2 in", "only engram.rows_per_head can change"]),
        (["engram.hash_seed=1"], ["engram.hash_seed = 1 is 0 in"]),
        ([], ["holds this model already"]),
        (["engram=none"], ["engram=none", "never taken away"]),
    ],
    ids=lambda value: value[0] if value and "=" in value[0] else None,
)
def test_what_a_source_with_engram_cannot_become(
    program: Program, moe: Path, tmp_path: Path, arguments: list[str], told: list[str]
) -> None:
    assert program(moe, tmp_path / "added")[0] == 0
    _refused(program, tmp_path / "added", tmp_path, told, *arguments)


def test_dense_models_are_refused(program: Program, tmp_path: Path) -> None:
    dense = _checkpoint(tmp_path / "dense", program.corpus, "model.moe=none")
    _refused(program, dense, tmp_path, ["is a dense model", "upcycling"])


def test_sources_that_cannot_be_read(program: Program, moe: Path, tmp_path: Path) -> None:
    _refused(program, tmp_path / "nowhere", tmp_path, ["is not a complete checkpoint"])
    source = Path(shutil.copytree(moe, tmp_path / "damaged"))
    file = next((source / "backbone").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    _refused(program, source, tmp_path, [str(file), "is damaged"])


def test_target_that_exists_and_another_tokenizer(program: Program, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    _refused(program, moe, tmp_path, [f"{tmp_path / 'target'} exists already"])
    (tmp_path / "target").rmdir()
    program.corpus = build_tiny_corpus(tmp_path / "other", vocab_size=512)
    _refused(program, moe, tmp_path, ["was trained with another tokenizer"])


def _refused(program: Program, source: Path, folder: Path, told: list[str], *arguments: str) -> None:
    before = files_under(folder)
    code, output, errors = program(source, folder / "target", *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    for part in told:
        assert part in errors
    assert files_under(folder) == before, "something was written"
