"""What a run tells: TensorBoard, the same numbers as JSON lines, and one progress line per logged step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from engram_megatron.config import RunConfig
from engram_megatron.training.board import (
    compared_summaries,
    compared_values,
    config_text,
    custom_scalars,
    dashboard,
    events_text,
)
from engram_megatron.training.rollback_log import read_rollbacks, rollbacks_text
from engram_megatron.training.run_events import read_events
from engram_megatron.training.run_folder import RunFolder


class MetricsLog:
    """Writes the numbers of a step. Exists on the first rank only.

    After a resume, steps that the broken-off run had logged beyond the checkpoint are dropped from `metrics.jsonl`
    and hidden in TensorBoard (`purge_step`), so that curves do not overlap.
    """

    def __init__(self, folder: RunFolder, *, first_step: int, num_steps: int, output: TextIO) -> None:
        self.num_steps = num_steps
        self.output = output
        self.started = time.monotonic()
        self.first_step = self.last_step = first_step
        self.validated_step = _drop_lines_after(folder, first_step)
        self.lines = folder.metrics_file.open("a", buffering=1)
        self.board = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
        self.folder = folder
        self._tell_history(first_step)

    def describe(self, config: RunConfig, num_ranks: int) -> None:
        """Show in TensorBoard what runs: the config, what people compare it by, and the curves to look at first."""
        self.board.add_text("config", config_text(config))
        self.board.add_custom_scalars(custom_scalars(dashboard(config)))
        writer: Any = self.board.file_writer
        for summary in compared_summaries(compared_values(config, num_ranks)):
            writer.add_summary(summary)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` (TensorBoard tags to numbers) of step `step` (1-based: after the update) and print a line."""
        self._write(step, values)
        self.output.write(_progress(step, self.num_steps, values, self._eta(step)) + "\n")
        self.output.flush()

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Log the validation numbers after `step` updates and print a line. A resume that validates the step of its
        checkpoint again only prints it."""
        if step != self.validated_step:
            self._write(step, values)
            self.validated_step = step
        self.say(f"step {step:>6}/{self.num_steps} | validation loss {values['validation/loss']:.4f}")

    def saved(self, step: int, values: Mapping[str, float], where: str) -> None:
        """Log the numbers of the checkpoint after `step` updates, now that it is complete, and print a line."""
        self._write(step, values)
        self.say(f"saved {where}")

    def say(self, line: str) -> None:
        self.output.write(line + "\n")
        self.output.flush()

    def close(self) -> None:
        self._tell_history(self.last_step)
        self.board.close()
        self.lines.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.last_step = max(self.last_step, step)
        record: dict[str, Any] = {"step": step, **values}
        self.lines.write(json.dumps(record) + "\n")
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step)

    def _tell_history(self, step: int) -> None:
        events = read_events(self.folder.path)
        if events:
            self.board.add_text("events", events_text(events), step)
        rollbacks = read_rollbacks(self.folder.path)
        if rollbacks:
            self.board.add_text("rollbacks", rollbacks_text(rollbacks), step)

    def _eta(self, step: int) -> float:
        done = step - self.first_step
        return (time.monotonic() - self.started) / max(done, 1) * (self.num_steps - step)


def _drop_lines_after(folder: RunFolder, first_step: int) -> int | None:
    """Keep the lines up to `first_step`; returns the last step that was validated among them."""
    if not folder.metrics_file.exists():
        return None
    kept, validated_step = [], None
    for line in folder.metrics_file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run
        if record["step"] <= first_step:
            kept.append(line + "\n")
            if "validation/loss" in record:
                validated_step = int(record["step"])
    temporary = folder.metrics_file.with_suffix(".partial")
    temporary.write_text("".join(kept))
    temporary.replace(folder.metrics_file)
    return validated_step


def _progress(step: int, num_steps: int, values: Mapping[str, float], eta_s: float) -> str:
    minutes, seconds = divmod(int(eta_s), 60)
    parts = [
        f"step {step:>6}/{num_steps}",
        f"loss {values['train/loss']:.4f}",
        f"grad norm {values['train/grad_norm']:.3f}",
        f"lr {values['train/learning_rate']:.2e}",
        f"{values['perf/tokens_per_second']:,.0f} tok/s",
        f"eta {minutes}:{seconds:02d}",
    ]
    if "gather/unique_ratio" in values:
        parts.insert(-1, f"unique rows {values['gather/unique_ratio']:.0%}")
    return " | ".join(parts)
