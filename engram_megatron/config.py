"""What a run is: frozen dataclasses, one per component, composed in `RunConfig`.

Every field says its unit in its name or comment. `validate` methods raise `UsageError` for what cannot work; they
know only the config, never the machine. A field marked `RESUME_FREE` may change when a run is resumed; every other
field must stay (`training.resume` compares them).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Literal

from engram_megatron.config_fields import DType, check, free, path
from engram_megatron.config_optimizer import OptimizerConfig
from engram_megatron.config_spikes import SpikeConfig
from engram_megatron.config_tables import TablesConfig

RecomputedModule = Literal["attention", "core_attention", "feed_forward", "mhc", "engram"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434) without query compression by default."""

    num_heads: int = 32
    query_lora_rank: int | None = None  # None: one dense query projection
    kv_lora_rank: int = 512
    nope_head_dim: int = 128  # per head, without position
    rope_head_dim: int = 64  # per head for queries, shared by all heads for keys
    value_head_dim: int = 128
    rope: Literal["rope", "yarn"] = "rope"
    rope_theta: float = 10000.0
    # YaRN (arXiv 2309.00071), read only when rope = "yarn"; the paper's long phase: scale 10, 32,768 tokens
    yarn_scale: float = 10.0
    yarn_original_length: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 0.707
    yarn_mscale_all_dim: float = 0.707

    def validate(self) -> None:
        for name in ("num_heads", "kv_lora_rank", "nope_head_dim", "rope_head_dim", "value_head_dim"):
            check(getattr(self, name) > 0, f"model.attention.{name} = {getattr(self, name)} must be positive")
        check(
            self.query_lora_rank is None or self.query_lora_rank > 0,
            f"model.attention.query_lora_rank = {self.query_lora_rank} must be positive or none",
        )
        check(self.rope_head_dim % 2 == 0, f"model.attention.rope_head_dim = {self.rope_head_dim} must be even")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE with sigmoid scores and loss-free balancing (arXiv 2408.15664)."""

    num_experts: int = 72
    top_k: int = 6
    num_shared_experts: int = 2
    expert_ffn_size: int = 1536
    num_leading_dense_layers: int = 1
    # The Engram paper states none of the three below: scaling is DeepSeek-V3's, the bias speed too.
    routed_scaling_factor: float = 2.5
    bias_update_rate: float = 1e-3
    # Of the router's matrix product; megatron-core takes the sigmoid of the scores in float32 in any case.
    router_dtype: Literal["float32", "float64"] = "float32"

    def validate(self, num_layers: int) -> None:
        check(self.expert_ffn_size > 0, f"model.moe.expert_ffn_size = {self.expert_ffn_size} must be positive")
        check(
            self.num_shared_experts >= 0,
            f"model.moe.num_shared_experts = {self.num_shared_experts} must not be negative",
        )
        check(
            0 < self.top_k <= self.num_experts,
            f"model.moe.top_k = {self.top_k} must lie in 1..num_experts = {self.num_experts}",
        )
        check(
            0 <= self.num_leading_dense_layers <= num_layers,
            f"model.moe.num_leading_dense_layers = {self.num_leading_dense_layers} exceeds num_layers = {num_layers}",
        )


@dataclass(frozen=True, kw_only=True)
class HyperConnectionConfig:
    """Manifold-constrained hyper-connections (arXiv 2512.24880). One stream switches them off."""

    num_streams: int = 4
    sinkhorn_iterations: int = 20
    # near_identity: b_res = 6I - 3, b_pre = -3 but +3 on the home stream (a third party's reading); zero_bias: all zero
    init: Literal["near_identity", "zero_bias"] = "near_identity"
    alpha_init: float = 0.01
    mapping_dtype: Literal["float32", "float64"] = "float32"

    def validate(self) -> None:
        check(self.num_streams >= 1, f"model.mhc.num_streams = {self.num_streams} must be at least 1")
        check(self.sinkhorn_iterations >= 1, f"model.mhc.sinkhorn_iterations = {self.sinkhorn_iterations} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one layer that predicts the token after the
    next. It trains the same embedding and head, holds no Engram, and is left out of inference."""

    num_layers: int = 0  # 0 or 1
    loss_weight: float = 0.3  # lambda of Eq. 25

    def validate(self) -> None:
        check(self.num_layers in (0, 1), f"model.mtp.num_layers = {self.num_layers} must be 0 or 1")
        check(
            self.loss_weight > 0 and isfinite(self.loss_weight),
            f"model.mtp.loss_weight = {self.loss_weight} must be positive and finite",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone. `vocab_size` is the embedding's height, fixed here so that no layout pads it."""

    num_layers: int = 30
    hidden_size: int = 2560
    vocab_size: int = 129280
    dense_ffn_size: int = 12288
    norm_eps: float = 1e-20
    init_std: float = 0.006  # DeepSeek-V3's; not stated for Engram
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig | None = MoEConfig()  # None: dense feed-forward in every layer
    mhc: HyperConnectionConfig = HyperConnectionConfig()
    mtp: MTPConfig = MTPConfig()

    def validate(self) -> None:
        for name in ("num_layers", "hidden_size", "vocab_size", "dense_ffn_size"):
            check(getattr(self, name) > 0, f"model.{name} = {getattr(self, name)} must be positive")
        check(self.norm_eps > 0, f"model.norm_eps = {self.norm_eps} must be positive")
        self.attention.validate()
        self.mhc.validate()
        self.mtp.validate()
        if self.moe is not None:
            self.moe.validate(self.num_layers)


@dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Conditional memory (arXiv 2601.07372). `rows_per_head` is a minimum: heads take primes."""

    layer_numbers: tuple[int, ...] = (2, 15)  # 1-based, as in the paper
    hash_seed_ids: tuple[int, ...] = (2, 15)  # the numbers that seed the multipliers; the demo's convention differs
    max_ngram_order: int = 3  # orders 2..max
    num_heads_per_order: int = 8
    rows_per_head: int = 2262400
    memory_dim: int = 1280  # d_mem: the width of all heads of all orders together
    hash_seed: int = 0
    pad_token_id: int = 2  # raw id, compressed with the others
    # Rows ~ N(0, init_std^2). The paper does not say; the demo's nn.Embedding has 1.0. A row that training rarely
    # touches keeps adding its initial noise, and engram_tiny loses 0.27 nats with 1.0 (docs/results).
    init_std: float = 0.02
    compression: bool = True  # merge token ids whose normalised text is equal
    gate: bool = True
    conv: bool = True  # False: DeepSeek-V4.1's variant
    conv_kernel_size: int = 4
    bias: bool = False  # True: the demo's biases on the key and value projections
    multi_branch: bool = True  # False: one fusion on the hidden state after H_pre of attention
    norm_eps: float = 1e-20  # of the key and query norms
    conv_norm_eps: float = 1e-5  # the demo's; at 1e-20 the gradient at a zero value would be multiplied by 1e10
    cut_at_documents: bool = True  # n-gram windows and convolution restart at document starts

    @property
    def num_heads(self) -> int:
        """Heads of one layer, over all orders (H in the shape legend)."""
        return (self.max_ngram_order - 1) * self.num_heads_per_order

    @property
    def row_dim(self) -> int:
        """Width of one table row."""
        return self.memory_dim // self.num_heads

    def validate(self, num_layers: int) -> None:
        for name in ("num_heads_per_order", "conv_kernel_size"):
            check(getattr(self, name) >= 1, f"engram.{name} = {getattr(self, name)} must be at least 1")
        check(self.max_ngram_order >= 2, f"engram.max_ngram_order = {self.max_ngram_order} must be at least 2")
        check(
            len(self.layer_numbers) == len(self.hash_seed_ids) and len(self.layer_numbers) > 0,
            f"engram.layer_numbers {self.layer_numbers} and engram.hash_seed_ids {self.hash_seed_ids} "
            "must have the same length, at least 1",
        )
        check(
            list(self.layer_numbers) == sorted(set(self.layer_numbers)),
            f"engram.layer_numbers {self.layer_numbers} must rise without repeats",
        )
        for number in self.layer_numbers:
            check(1 <= number <= num_layers, f"engram.layer_numbers: {number} is not in 1..num_layers = {num_layers}")
        check(
            self.memory_dim % self.num_heads == 0 and self.memory_dim > 0,
            f"engram.memory_dim = {self.memory_dim} must be divisible by (max_ngram_order - 1) * num_heads_per_order "
            f"= {self.max_ngram_order - 1} * {self.num_heads_per_order} = {self.num_heads}",
        )
        check(self.rows_per_head >= 2, f"engram.rows_per_head = {self.rows_per_head} must be at least 2")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks. The data dimension follows: world = tensor * pipeline * context * data.

    All of it may change at a resume, and the number of ranks with it: a checkpoint knows no layout.
    """

    tensor: int = free(1)
    pipeline: int = free(1)
    virtual_pipeline: int = free(1)  # chunks of layers per pipeline rank; > 1: interleaved schedule, smaller bubble
    # "auto": layers balanced over chunks by cost; or megatron-core's notation, chunk by chunk: "Et*3|t*4|t*3L"
    pipeline_layout: str = free("auto")
    context: int = free(1)
    expert: int = free(1)
    # Optimizer state divided over data * context replicas: Muon by whole matrices, the vocabulary by rows
    distributed_optimizer: bool = free(False)
    # A collective that takes longer than this ends the job. Finite, so that survivors of a dead node do not hang.
    collective_timeout_s: int = free(600)

    def data(self, world_size: int) -> int:
        """Number of data-parallel replicas; raises `UsageError` where the equation does not close."""
        check(world_size >= 1, f"number of ranks = {world_size} must be at least 1")
        model_ranks = prod((self.tensor, self.pipeline, self.context))
        check(
            world_size % model_ranks == 0,
            f"parallel: world size {world_size} is not divisible by tensor * pipeline * context = "
            f"{self.tensor} * {self.pipeline} * {self.context} = {model_ranks}",
        )
        replicas = world_size // model_ranks
        shared = replicas * self.tensor * self.context
        check(
            shared % self.expert == 0,
            f"parallel: data * tensor * context = {replicas} * {self.tensor} * {self.context} = {shared} "
            f"is not divisible by expert = {self.expert}",
        )
        return replicas

    def validate(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "collective_timeout_s"):
            check(getattr(self, name) >= 1, f"parallel.{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from. A corpus directory holds `train` and `validation` (see `engram_data.corpus`)."""

    corpus: str = path()
    tokenizer: str = path()  # a tokenizer.json; empty: the one the corpus carries
    sequence_length: int = 4096
    shuffle_seed: int = 1234
    # Attention, n-gram windows and convolution see one document only; False packs as one stream of text.
    separate_documents: bool = True

    def validate(self) -> None:
        check(self.sequence_length >= 2, f"data.sequence_length = {self.sequence_length} must be at least 2")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save. Checkpoints stand in `run_dir/checkpoints/step_XXXXXXXX`."""

    every_steps: int = free(1000)  # 0: only at the end and at a stop signal
    keep_last: int = free(3)  # older ones are removed after a new one is complete; 0 keeps all
    keep_every_steps: int = free(0)  # beside them, those of a step that this divides are kept for good; 0: none
    asynchronous: bool = free(True)  # training goes on while a checkpoint is written
    # Of memory per rank for copies of table rows that are updated before they are written; an update that needs more
    # waits for the writer. 0: it waits for each of its rows
    staging_bytes: int = free(1 << 30)
    # Saves between two full ones that hold, of the tables, the rows that changed since the full one; 0: all are full
    deltas_between_full: int = free(0)
    # A folder on every node's own disk, for saves between those: each node's files there, with a copy on the next node
    local_dir: str = path(free=True)
    local_every_steps: int = free(0)  # of those steps that have no save of the run folder; needs local_dir
    init_from: str = path()  # a checkpoint folder whose weights (and tables) start this run; nothing else is taken

    def validate(self) -> None:
        for name in (
            *("every_steps", "keep_last", "keep_every_steps", "staging_bytes", "deltas_between_full"),
            "local_every_steps",
        ):
            check(getattr(self, name) >= 0, f"checkpoint.{name} = {getattr(self, name)} must not be negative")
        check(
            bool(self.local_dir) == (self.local_every_steps > 0),
            f"checkpoint.local_dir = {self.local_dir!r} and checkpoint.local_every_steps = {self.local_every_steps} go "
            "together: set both for saves to the nodes' own disks, or none",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and reporting of a run."""

    num_steps: int = 50000
    global_batch_size: int = 1280  # sequences per step
    micro_batch_size: int = free(1)  # sequences per forward pass of one rank
    dtype: DType = "bfloat16"
    seed: int = 1234
    # Activations to compute again in the backward pass: all of every layer, or those of `recompute_modules`
    recompute: Literal["none", "selective", "full"] = free("none")
    recompute_modules: tuple[RecomputedModule, ...] = free(())
    log_every_steps: int = free(1)
    validate_every_steps: int = free(500)  # 0: only at the end
    validation_batches: int = free(8)  # global batches
    peak_tflops_per_rank: float = free(0.0)  # 0: unknown, MFU is not reported
    heartbeat_every_s: float = free(5.0)  # each rank's sign of life in run_dir/heartbeats; 0: none
    profile_start: int = free(0)
    profile_stop: int = free(0)  # profile steps start..stop-1 with torch.profiler; stop = 0: off

    def validate(self) -> None:
        for name in ("num_steps", "global_batch_size", "micro_batch_size", "log_every_steps", "validation_batches"):
            check(getattr(self, name) >= 1, f"training.{name} = {getattr(self, name)} must be at least 1")
        check(
            0 <= self.heartbeat_every_s < inf,
            f"training.heartbeat_every_s = {self.heartbeat_every_s} must be 0 (none) or a number of seconds",
        )
        check(
            self.recompute != "selective" or len(self.recompute_modules) > 0,
            "training.recompute = selective, but training.recompute_modules is empty: name some, or choose none",
        )
        check(
            self.recompute == "selective" or not self.recompute_modules,
            f"training.recompute_modules = {','.join(self.recompute_modules)} needs training.recompute=selective, not "
            f"{self.recompute}",
        )

    @property
    def recomputed_modules(self) -> frozenset[str]:
        """The parts of a layer that are computed again one by one; none where whole layers are."""
        if self.recompute != "selective":
            return frozenset()
        modules = frozenset(self.recompute_modules)
        return modules | {"core_attention"} if "attention" in modules else modules

    def num_microbatches(self, data_ranks: int) -> int:
        """Microbatches that one rank runs in a step; raises `UsageError` where the batch does not divide."""
        per_pass = self.micro_batch_size * data_ranks
        check(
            self.global_batch_size % per_pass == 0,
            f"training.global_batch_size = {self.global_batch_size} is not divisible by micro_batch_size * data ranks "
            f"= {self.micro_batch_size} * {data_ranks} = {per_pass}",
        )
        return self.global_batch_size // per_pass


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `run_dir` is where everything that it writes goes."""

    name: str
    run_dir: str = path(free=True)
    model: ModelConfig = ModelConfig()
    engram: EngramConfig | None = EngramConfig()  # None: the same backbone without conditional memory
    tables: TablesConfig = TablesConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    training: TrainingConfig = TrainingConfig()
    spikes: SpikeConfig = SpikeConfig()

    def validate(self) -> None:
        """Raise `UsageError` for the first thing that cannot work on any machine."""
        self.model.validate()
        if self.engram is not None:
            self.engram.validate(self.model.num_layers)
            self.tables.validate(self.engram.row_dim)
        self.parallel.validate()
        self.optimizer.validate()
        self.data.validate()
        self.checkpoint.validate()
        self.training.validate()
        self.spikes.validate(self.checkpoint.every_steps, self.checkpoint.keep_last)
        absent = {"mhc": self.model.mhc.num_streams == 1, "engram": self.engram is None}
        for module in self.training.recompute_modules:
            check(
                not absent.get(module, False),
                f"training.recompute_modules = {','.join(self.training.recompute_modules)}: this model has no {module}",
            )
