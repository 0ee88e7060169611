"""The inputs of a "module" case: read from its file, or made by the formula that the manifest names.

A formula lets a case have millions of rows in a small file: element i (row-major) of an array with tag t is
base + (u - 1/2) * scale in float32, u the upper 24 bits of SplitMix64's output for the number t * 2^48 + i.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engram_megatron.conformance.case import Array, Arrays, Case, Mismatch

WEIGHTS = ("value_w", "value_b", "key_w", "key_b", "norm_key", "norm_query", "conv_norm", "conv_w")


def module_inputs(case: Case, arrays: Arrays) -> Arrays:
    """`WEIGHTS`, `hidden` and `cotangent` [B, T, M, C], all float32, and the rows that the case reads:
    `unique_rows` [U] (row numbers, rising), `embedding_rows` [U, row_dim], `row_index` [B, T, H] into them."""
    unique_rows, row_index = np.unique(arrays["rows"], return_inverse=True)
    inputs: Arrays = {"unique_rows": unique_rows, "row_index": row_index.reshape(arrays["rows"].shape)}
    if case.entry["weights"] == "in file":
        inputs |= {name: arrays[f"w_{name}"] for name in WEIGHTS}
        inputs |= {name: arrays[name] for name in ("hidden", "cotangent")}
        inputs["embedding_rows"] = arrays["w_embedding"][unique_rows]
    elif case.entry["weights"] == "formula":
        inputs |= _formula_inputs(case, unique_rows)
    else:
        raise Mismatch(f"weights = {case.entry['weights']!r}: expected 'in file' or 'formula'")
    return inputs


def _formula_inputs(case: Case, unique_rows: Array) -> Arrays:
    config, constants = case.entry["config"], case.entry["formula_tags_base_scale"]
    C, M, row_dim = config["hidden_size"], config["hc_mult"], config["row_dim"]
    E = (config["max_ngram_size"] - 1) * config["n_embed_per_ngram"]
    activations = (case.entry["B"], case.entry["T"], M, C)
    shapes = {
        "value_w": (C, E),
        "value_b": (C,),
        "key_w": (M, C, E),
        "key_b": (M, C),
        "norm_key": (M, C),
        "norm_query": (M, C),
        "conv_norm": (M, C),
        "conv_w": (M * C, 1, config["kernel_size"]),
        "hidden": activations,
        "cotangent": activations,
    }
    made: Arrays = {
        name: formula_values(np.arange(np.prod(shape), dtype=np.uint64), *constants[name]).reshape(shape)
        for name, shape in shapes.items()
    }
    if "zero_query_at" in case.entry:
        made["hidden"][tuple(case.entry["zero_query_at"])] = 0.0
    elements = unique_rows[:, None] * row_dim + np.arange(row_dim)
    made["embedding_rows"] = formula_values(elements.astype(np.uint64), *constants["embedding"])
    return made


def formula_values(index: NDArray[np.uint64], tag: int, base: float, scale: float) -> NDArray[np.float32]:
    """The float32 elements `index` (row-major numbers) of the array with this tag; the shape is index's."""
    z = index + np.uint64((tag << 48) + 0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2**24
    return (base + (uniform - 0.5) * scale).astype(np.float32)
