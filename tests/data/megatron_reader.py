"""What megatron-core's own classes read of a dataset, as JSON: python megatron_reader.py PREFIX SEQUENCE_LENGTH"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np

from engram_megatron import platform


def main() -> None:
    platform.install()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix, sequence_length = sys.argv[1], int(sys.argv[2])
    dataset = IndexedDataset(prefix)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        split="1,0,0",
        tokenizer=SimpleNamespace(vocab_size=512, eod=1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    documents = np.arange(len(dataset.document_indices) - 1, dtype=np.int32)
    windows = GPTDataset(dataset, None, documents, None, Split.train, config)
    found = {
        "dtype": np.dtype(dataset.index.dtype).name,
        "sequences": [np.asarray(dataset[i]).tolist() for i in range(len(dataset))],
        "document_indices": dataset.document_indices.tolist(),
        "document_order": windows.document_index.tolist(),
        "window_order": windows.shuffle_index.tolist(),
        "windows": [windows[i]["tokens"].tolist() for i in range(len(windows))],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
