"""A run on real text, saved by two ranks: its export gives Megatron's logits, and another run starts from an import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_case import export, load_model, logits_of
from ranks import run_ranks
from tiny_run import Start, build_tiny_corpus, run_starts, tiny_config, train_losses

from engram_checkpoints.huggingface.import_folder import import_folder
from engram_data.batch import Batch
from engram_data.corpus import Corpus
from engram_data.stream import TokenStream

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the corpus, the run `trained`, and the folder `out`."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = build_tiny_corpus(folder / "corpus")
    run_starts([Start(tiny_config(corpus, folder / "trained"))])
    export(folder / "trained/checkpoints/step_00000006", folder / "out")
    return folder


def _text(folder: Path) -> Batch:
    """Sequences with two documents each, one that ends and one that starts."""
    corpus = Corpus.open(str(folder / "corpus"), "train")
    stream = TokenStream(
        corpus, sequence_length=64, global_batch_size=32, micro_batch_size=32, data_rank=0, data_ranks=1, seed=0
    )
    batches = [stream.microbatches(step)[0] for step in range(20)]
    tokens, documents = (np.concatenate([getattr(b, name) for b in batches]) for name in ("tokens", "document_ids"))
    several = np.flatnonzero(documents[:, -1] > 0)[:4]
    assert len(several) == 4
    chosen = tokens[several]
    return Batch(tokens=chosen, labels=chosen, loss_mask=chosen > 0, document_ids=documents[several])


def test_logits_on_text_equal_megatrons(folder: Path) -> None:
    batch = _text(folder)
    saved = [folder / "trained/checkpoints/step_00000006"]
    (expected,) = run_ranks(logits_of, 1, folder / "corpus/tokenizer.json", saved, batch)[0]
    with torch.no_grad():
        logits = load_model(folder / "out")(torch.from_numpy(batch.tokens)).logits.numpy()
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_run_starts_from_an_import(folder: Path) -> None:
    """Its losses are those of a run that starts from the checkpoint itself."""
    corpus, trained = folder / "corpus", folder / "trained/checkpoints/step_00000006"
    import_folder(folder / "out", folder / "back", tiny_config(corpus, folder), (), tokenizer=None)
    run_starts(
        [
            Start(tiny_config(corpus, folder / name, f"checkpoint.init_from={source}", "training.num_steps=3"))
            for name, source in (("ours", trained), ("theirs", folder / "back"))
        ]
    )
    ours, theirs = (train_losses(folder / name) for name in ("ours", "theirs"))
    assert len(ours) == 3
    assert ours == theirs
