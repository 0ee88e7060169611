"""Mistakes are refused before any rank starts: exit code 2, one line that says what to change, nothing on disk."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tiny_run import TINY, build_tiny_corpus, files_under, tiny_config
from train_program import TRAIN, train_module

from engram_checkpoints.checkpoint_files import FileSums, complete
from engram_checkpoints.train_state import FORMAT, TrainState
from engram_data.corpus import Corpus
from engram_megatron.config import RunConfig
from engram_megatron.overrides import apply_overrides, to_dict
from engram_megatron.training.preflight import open_inputs
from engram_megatron.training.run_folder import write_json


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """launch/train.py as a module."""
    return train_module()


class Refused:
    """Runs the program with `TINY`, asserts that it refuses, and returns the line after `error: `."""

    def __init__(
        self,
        program: ModuleType,
        folder: Path,
        corpus: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        self.program, self.folder, self.corpus = program, folder, corpus
        self.monkeypatch, self.capfd = monkeypatch, capfd
        self.run_dir = folder / "run"
        monkeypatch.delenv("RANK", raising=False)
        # A check that is missing must fail here and not start a training.
        monkeypatch.setattr("engram_megatron.training.launch_ranks.launch_ranks", self._started)

    def _started(self, *_arguments: object) -> int:
        raise AssertionError("nothing was refused: the ranks would have started")

    def __call__(self, *arguments: str, preset: str = "engram_tiny", tiny: bool = True) -> str:
        command = [preset, "--nproc-per-node=2", *(TINY if tiny else ()), f"data.corpus={self.corpus}"]
        self.monkeypatch.setattr("sys.argv", [str(TRAIN), *command, f"run_dir={self.run_dir}", *arguments])
        before = files_under(self.folder)
        code = self.program.main()
        output, errors = self.capfd.readouterr()
        assert (code, output) == (2, "")
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1, errors
        assert files_under(self.folder) == before, "something was written"
        return errors.removeprefix("error: ")


@pytest.fixture
def refused(
    program: ModuleType,
    tmp_path: Path,
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Refused:
    return Refused(program, tmp_path, tiny_corpus, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimizer.learning_rat=1"], ["'optimizer.learning_rat'", "did you mean 'optimizer.learning_rate'"]),
        (["optimizer.learning_rate=fast"], ["optimizer.learning_rate", "'fast'", "float"]),
        (["training.num_steps=1.5"], ["training.num_steps", "'1.5'", "int"]),
        (["training.dtype=float8"], ["training.dtype", "'float8'", "bfloat16, float32, float64"]),
        (["nonsense"], ["'nonsense'", "key=value"]),
        (["parallel.expert=3"], ["2 * 1 * 1 = 2", "expert = 3"]),
        (["parallel.tensor=3"], ["world size 2", "3 * 1 * 1 = 3"]),
        (["training.global_batch_size=6"], ["global_batch_size = 6", "2 * 2 = 4"]),
        (["parallel.context=2", "data.sequence_length=66"], ["data.sequence_length = 66", "2 * 2 * 1 = 4"]),
        (["parallel.tensor=2", "data.sequence_length=63"], ["data.sequence_length = 63", "parallel.tensor = 2"]),
        (["--nproc-per-node=0"], ["number of ranks = 0"]),
        (["optimizer.warmup_steps=100"], ["optimizer.warmup_steps = 100", "training.num_steps = 6"]),
        (["--profile", "steps=5:3"], ["steps=5:3", "A < B"]),
        (["run_dir="], ["run_dir is not set", "run_dir=PATH"]),
        (["data.corpus="], ["data.corpus is not set", "data.corpus=PATH"]),
        (["data.corpus=/no/such/corpus"], ["/no/such/corpus", "build_corpus.py"]),
        (["model.vocab_size=512"], ["1024 ids", "model.vocab_size = 512"]),
        (["model.vocab_size=129280"], ["1024 ids", "model.vocab_size = 129280"]),
        (["engram.num_heads_per_order=0"], ["engram.num_heads_per_order = 0", "at least 1"]),
        (["optimizer.learning_rate=1e999"], ["learning_rate = inf", "finite"]),
        (["optimizer.adam_beta1=1.5"], ["adam_beta1 = 1.5", "[0, 1)"]),
        (["checkpoint.keep_last=-1"], ["checkpoint.keep_last = -1", "negative"]),
        (["data.tokenizer=/no/such/tokenizer.json"], ["/no/such/tokenizer.json", "cannot be read"]),
        (["data.sequence_length=1000000"], ["1000001", "shorter sequence"]),
        (["engram.rows_per_head=2000000000000"], ["GiB of host memory", "are free", "engram.rows_per_head"]),
        (["checkpoint.init_from=/no/such/checkpoint"], ["/no/such/checkpoint", "not a complete checkpoint"]),
        (["tables.placement=nvme"], ["tables.placement = nvme", "tables.nvme_dir=PATH"]),
        (["tables.nvme_dir=/data"], ["tables.nvme_dir = /data", "tables.placement=nvme"]),
        (["tables.hot_fraction=0"], ["tables.hot_fraction = 0.0", "(0, 1]"]),
        (["tables.placement=nvme", "tables.nvme_dir=/no/such/disk"], ["nvme_dir = /no/such/disk does not exist"]),
        (["tables.placement=nvme", "tables.nvme_dir=/dev/shm"], ["nvme_dir = /dev/shm lies in memory (tmpfs)"]),
        (["run_dir=/dev/null"], ["/dev/null", "not a folder"]),
        (["run_dir=/dev/null/run"], ["/dev/null", "not a folder"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else None,
)
def test_wrong_argument(refused: Refused, arguments: list[str], told: list[str]) -> None:
    line = refused(*arguments)
    for part in told:
        assert part in line


def test_unknown_preset(refused: Refused) -> None:
    assert "'engram_28b'; known presets: " in refused(preset="engram_28b", tiny=False)


def test_tables_of_the_40b_do_not_fit_a_small_host(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram_megatron.tables.host_memory.available_bytes", lambda: 64 * 1024**3)
    tables = ["engram.rows_per_head=7239680", "engram.num_heads_per_order=8", "engram.memory_dim=1280"]
    line = refused(*tables, "model.num_layers=15", "engram.layer_numbers=2,15", "engram.hash_seed_ids=2,15")
    # The paper's 18.53e9 table parameters in rows of 80, each 3 * 80 * 4 + 1 bytes: weight, two moments, a flag.
    assert f"need {18.534e9 / 80 * 964 / 1024**3:.2f} GiB" in line
    assert "64.00 GiB are free" in line


def test_tables_that_do_not_fit_the_disk(refused: Refused, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: shutil._ntuple_diskusage(0, 0, 10 * 1024**3))  # type: ignore[attr-defined]
    line = refused("tables.placement=nvme", f"tables.nvme_dir={disk}", "engram.rows_per_head=50000000")
    # 4 heads of 50 million rows, each 8 * 12 bytes
    assert f"need {4 * 5e7 * 96 / 1024**3:.2f} GiB on the disk of tables.nvme_dir = {disk}" in line
    assert "10.00 GiB are free" in line
    assert list(disk.iterdir()) == []


def test_corpus_that_was_not_finished(refused: Refused, tmp_path: Path) -> None:
    refused.corpus = Path(shutil.copytree(refused.corpus, tmp_path / "corpus"))
    (refused.corpus / "corpus.json").unlink()
    assert "is no finished corpus" in refused()


def test_corpus_with_a_truncated_shard(refused: Refused, tmp_path: Path) -> None:
    refused.corpus = Path(shutil.copytree(refused.corpus, tmp_path / "corpus"))
    shard = refused.corpus / "train/tokens/c/0"
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refused()
    assert str(shard) in line
    assert f"{shard.stat().st_size} bytes, not {shard.stat().st_size + 100}" in line


def test_tokenizer_that_did_not_make_the_corpus(refused: Refused, tmp_path: Path) -> None:
    other = build_tiny_corpus(tmp_path / "other", vocab_size=512) / "tokenizer.json"
    line = refused(f"data.tokenizer={other}")
    assert "rebuild the corpus or leave data.tokenizer unset" in line


def save_state(config: RunConfig, step: int = 4, world_size: int = 2) -> Path:
    """A run with one checkpoint, as far as a start looks at it: the state, and the mark that it is complete."""
    inputs = open_inputs(config, world_size, resume=True)
    checkpoint = Path(config.run_dir) / f"checkpoints/step_{step:08d}"
    checkpoint.mkdir(parents=True)
    write_json(Path(config.run_dir) / "config.json", to_dict(config))
    sums = FileSums(checkpoint)
    state = TrainState(
        step=step,
        tokens_seen=1024,
        world_size=world_size,
        corpus_fingerprint=inputs.train.fingerprint,
        tokenizer_sha256=inputs.train.tokenizer.sha256,
        hash_identity=None if inputs.hasher is None else inputs.hasher.identity(),
        config=to_dict(config),
    )
    state.write(checkpoint, sums)
    complete(checkpoint, sums.flush())
    return checkpoint


def test_folder_that_holds_a_run(refused: Refused) -> None:
    save_state(tiny_config(refused.corpus, refused.run_dir))
    assert "--resume" in refused()


@pytest.mark.parametrize("option", [(), ("--resume",)], ids=["start", "resume"])
def test_folder_that_holds_other_files(refused: Refused, option: tuple[str, ...]) -> None:
    refused.run_dir.mkdir()
    (refused.run_dir / "thesis.tex").touch()
    assert "thesis.tex" in refused(*option)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    with (run_dir / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def test_folder_in_which_a_job_runs(refused: Refused) -> None:
    save_state(tiny_config(refused.corpus, refused.run_dir))
    with locked(refused.run_dir):
        assert "in use by a running job" in refused("--resume")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimizer.learning_rate=1"], ["optimizer.learning_rate = 1.0", "0.002"]),
        (["training.num_steps=7"], ["training.num_steps = 7", "made with 6"]),
        (["engram=none"], ["engram = None"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_resume_with_another_key(refused: Refused, arguments: list[str], told: list[str]) -> None:
    save_state(tiny_config(refused.corpus, refused.run_dir))
    line = refused("--resume", *arguments)
    for part in ("cannot resume with", *told):
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nproc-per-node=3", "parallel.expert=1"], ["global_batch_size = 4", "2 * 3 = 6"]),
        (["--nproc-per-node=4"], ["global_batch_size = 4", "2 * 4 = 8"]),
        (["--nproc-per-node=3"], ["3 * 1 * 1 = 3", "expert = 2"]),
        (["training.micro_batch_size=3"], ["global_batch_size = 4", "3 * 2 = 6"]),
        (["parallel.tensor=2", "parallel.pipeline=2"], ["world size 2", "2 * 2 * 1 = 4"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_resume_in_a_layout_that_does_not_fit(refused: Refused, arguments: list[str], told: list[str]) -> None:
    save_state(tiny_config(refused.corpus, refused.run_dir))
    line = refused("--resume", *arguments)
    for part in told:
        assert part in line


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["parallel.expert=1"]),
        (4, ["parallel.tensor=2", "parallel.expert=4", "tables.block_rows=100"]),
        (4, ["training.micro_batch_size=1", "parallel.distributed_optimizer=true"]),
        (2, ["parallel.expert=1", "parallel.pipeline=2", "parallel.pipeline_layout=Et|tL"]),
    ],
    ids=str,
)
def test_resume_in_another_layout_is_let_through(
    ranks: int, overrides: list[str], tiny_corpus: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run")
    checkpoint = save_state(config)
    assert open_inputs(apply_overrides(config, overrides), ranks, resume=True).resume_from == checkpoint


def test_resume_on_another_corpus_in_the_same_place(refused: Refused, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(refused.corpus, tmp_path / "corpus"))
    old = Corpus.open(corpus, "train").fingerprint
    refused.corpus = corpus
    save_state(tiny_config(corpus, refused.run_dir))
    shutil.rmtree(corpus)
    build_tiny_corpus(corpus, num_documents=20)
    line = refused("--resume")
    assert old[:12] in line
    assert Corpus.open(corpus, "train").fingerprint[:12] in line


def test_resume_from_a_damaged_state(refused: Refused) -> None:
    state = save_state(tiny_config(refused.corpus, refused.run_dir)) / "train_state.json"
    state.write_text(state.read_text()[:-20])
    assert f"{state} is damaged" in refused("--resume")


def test_resume_from_a_state_of_another_version(refused: Refused) -> None:
    checkpoint = save_state(tiny_config(refused.corpus, refused.run_dir))
    sums = FileSums(checkpoint)
    sums.write_json(checkpoint / "train_state.json", {"format": FORMAT + 1, "new_field": 1})
    complete(checkpoint, sums.flush())
    assert f"format {FORMAT + 1}, this version reads format {FORMAT}" in refused("--resume")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engram.hash_seed=1", "another hash"),
        ("engram=none", "has Engram tables, this run has none"),
        ("model.dense_ffn_size=80", "has shape (192, 64) there and (160, 64) here"),
        ("model.moe.num_experts=8", "holds another model"),
    ],
)
def test_init_from_a_checkpoint_that_does_not_fit(refused: Refused, override: str, told: str) -> None:
    checkpoint = save_state(tiny_config(refused.corpus, refused.folder / "first"))
    assert told in refused(f"checkpoint.init_from={checkpoint}", override)
