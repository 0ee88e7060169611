"""What TensorBoard shows beside curves: the dashboard "Custom scalars", the table "HParams", texts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from torch.utils.tensorboard.summary import hparams

from engram_megatron.config import RunConfig
from engram_megatron.overrides import as_text, leaves, to_dict
from engram_megatron.training.run_events import Event

# {category: {chart: expressions for tags}}
Dashboard = dict[str, dict[str, list[str]]]

# What people compare runs by.
COMPARED_KEYS = (
    *("optimizer.learning_rate", "training.global_batch_size", "model.num_layers", "engram.layer_numbers"),
    *("engram.rows_per_head", "engram.memory_dim", "engram.max_ngram_order", "engram.num_heads_per_order"),
    *("model.hidden_size", "model.moe.num_experts", "model.moe.top_k", "model.mhc.num_streams"),
    *("tables.dtype", "tables.update", "optimizer.table_learning_rate_multiplier", "optimizer.warmup_steps"),
    *("optimizer.clip_grad_norm", "data.sequence_length", "training.num_steps", "training.dtype", "training.seed"),
)
COMPARED_METRICS = ("validation/loss", "train/loss", "perf/tokens_per_second")


def dashboard(config: RunConfig) -> Dashboard:
    """What to look at, in this order, of a run with this config."""
    found: Dashboard = {
        "Loss": {
            "loss (nats per token)": _tags("train/loss", "validation/loss", "train/mtp_loss"),
            "gradient norm": _tags("train/grad_norm"),
            "learning rates": _tags("train/learning_rate", "train/table_learning_rate"),
        }
    }
    if config.engram is not None:
        gates = {f"mean gate, layer {n}": _tags(f"engram/gate_mean/layer_{n}/.*") for n in config.engram.layer_numbers}
        found["Engram"] = gates | {
            "unique rows per lookup, share of the hottest 1 %": _tags("gather/unique_ratio", "gather/hottest_share"),
            "wait for rows (ms per step)": _tags("gather/wait_ms"),
            "thread of the tables (ms per step)": _tags("tables/(plan|fetch|return|update)_ms"),
            "rows never touched, n-grams in collision": _tags("tables/never_touched", "tables/collision_estimate"),
            "busiest owner of rows (times the mean)": _tags("tables/owner_imbalance"),
            "update of rows relative to their weights": _tags("tables/update_to_weight"),
        }
    if config.model.moe is not None:
        found["Experts"] = {
            "load of the busiest expert (times the mean)": _tags("moe/max_load/.*"),
            "load of the idlest expert (times the mean)": _tags("moe/min_load/.*"),
        }
    found["Speed"] = {
        "tokens per second": _tags("perf/tokens_per_second"),
        "time of a step (ms)": _tags("perf/step_ms"),
        "forward and backward of the slowest and the fastest rank (ms)": _tags(
            "perf/slowest_compute_ms", "perf/fastest_compute_ms"
        ),
    }
    if config.training.peak_tflops_per_rank > 0:
        found["Speed"]["MFU"] = _tags("perf/mfu")
    found["Memory"] = {
        "left on the fullest host (GiB)": _tags("memory/host_available_gib"),
        "of the largest rank: resident, on its GPU (GiB)": _tags("memory/resident_gib", "memory/device_gib"),
    }
    found["Checkpoints"] = {
        "until complete (s)": _tags("checkpoint/seconds", "local_snapshot/seconds"),
        "stalls of training (ms)": _tags("checkpoint/stall_ms", "local_snapshot/stall_ms"),
    }
    return found


def custom_scalars(found: Dashboard) -> dict[str, dict[str, list[Any]]]:
    """As `SummaryWriter.add_custom_scalars` wants it."""
    return {name: {title: ["Multiline", tags] for title, tags in charts.items()} for name, charts in found.items()}


def compared_values(config: RunConfig, num_ranks: int) -> dict[str, str | float | bool]:
    """Those of `COMPARED_KEYS` that the config has, its name and the number of ranks."""
    found: dict[str, Any] = {key: value for key, value, _ in leaves(config)}
    values = {key: found[key] for key in COMPARED_KEYS if key in found}
    plain = {key: value if isinstance(value, int | float | str) else as_text(value) for key, value in values.items()}
    return {**plain, "name": config.name, "ranks": num_ranks}


def compared_summaries(values: dict[str, str | float | bool]) -> list[Any]:
    """What "HParams" shows of a run: these values, and the curves `COMPARED_METRICS`."""
    experiment, session, _end = hparams(values, dict.fromkeys(COMPARED_METRICS, 0.0))
    return [experiment, session]


def config_text(config: RunConfig) -> str:
    """Markdown."""
    return "    " + json.dumps(to_dict(config), indent=2).replace("\n", "\n    ")


def events_text(events: Sequence[Event]) -> str:
    """A table in Markdown, the newest event first."""
    lines = ["| when | job | what | |", "|---|---|---|---|"]
    for event in reversed(events):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        details = event.details.replace("|", "\\|")
        lines.append(f"| {when} | {event.job} | {event.kind.replace('_', ' ')} | {details} |")
    return "\n".join(lines)


def _tags(*expressions: str) -> list[str]:
    return [f"{expression}$" for expression in expressions]
