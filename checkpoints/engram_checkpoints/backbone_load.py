"""How a rank loads its part of the backbone: as megatron-core does, with `PieceReader` in place of torch's reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict

from engram_checkpoints.piece_reader import PieceReader


class PartsLoad(TorchDistLoadShardedStrategy):
    """Reads the parts of global tensors that a state dict names, and no more of a stored piece than its rows."""

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> dict[str, Any]:
        """Called by `dist_checkpointing.load` with the sharded tensors and objects of this rank."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat_keys, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=tensors, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        load_state_dict(state, storage_reader=PieceReader(checkpoint_dir), planner=planner, no_dist=True)
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        found: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(loaded, flat_keys, renamed)
        _restore_dict_types(found, sharded_state_dict)
        return found
