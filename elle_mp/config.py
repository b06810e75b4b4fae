"""The configuration: one typed tree, strict, checked whole before anything starts.

Reading a file into this tree, with overrides and one-line errors, is :mod:`elle_mp.config_file`'s work.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["bert", "gpt", "llama"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, validate_default=True, allow_inf_nan=False
    )


class RunConfig(Section):
    """Where the run lives, and the seed that all of its randomness comes from."""

    dir: str = "runs/default"
    """The run directory."""
    seed: NonNegative = 1
    """Initial weights, growth noise, sample order, MLM masks and dropout depend on it and on nothing else."""
    data: str = ""
    """Folder in which the stream's relative ``data`` paths lie; the working directory when empty."""


class ModelConfig(Section):
    """The model before its first growth."""

    family: Family = "gpt"
    """``bert`` (post-LN, MLM), ``gpt`` (pre-LN) or ``llama`` (RMSNorm, RoPE, SwiGLU, GQA)."""
    layers: Positive = 4
    """Transformer layers."""
    heads: Positive = 4
    """Query heads."""
    head_dim: Positive = 32
    """Channels of a head; even for ``llama`` (RoPE turns pairs)."""
    width: Positive | None = None
    """Width of the residual stream; ``heads * head_dim`` when not given."""
    kv_groups: Positive | None = None
    """Key/value heads (``llama``); all query heads when not given."""
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    """Inner width of the MLP over the model's width; 4, or 8/3 for ``llama``. Rounded up to a multiple of 8."""
    mlp: Positive | None = None
    """Inner width of the MLP, instead of ``mlp_ratio``."""
    seq_len: Positive = 128
    """Positions, the prompt's included."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """After the embeddings and each sub-layer."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """On the attention weights; as ``dropout`` when not given."""
    tied: bool | None = None
    """One table for input and output; true for ``bert`` and ``gpt``, false for ``llama`` when not given."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance in LayerNorm and RMSNorm."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies (``llama``)."""
    vocab: Positive | None = None
    """Ids of the model when more than the tokenizer has. Those beyond it are reserved rows of the table: they get no
    probability until a tokenizer that has them trains."""
    vocab_multiple: Positive = 128
    """The table is padded to a multiple of this, whatever the layout."""

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.width or self.heads * self.head_dim

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_groups or self.heads

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP."""
        ratio = self.mlp_ratio or (8 / 3 if self.family == "llama" else 4.0)
        return self.mlp or ceil(ratio * self.embed / 8 - 1e-9) * 8

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.kv_groups is not None:
            if self.family != "llama":
                raise ValueError(f"kv_groups is for the llama family; {self.family} has a key for every head")
            if self.heads % self.kv_groups:
                near = nearest_divisors(self.heads, self.kv_groups)
                raise ValueError(f"kv_groups={self.kv_groups} does not divide heads={self.heads}; {near} would")
        if self.family == "llama" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd and RoPE turns pairs; {self.head_dim + 1} would do")
        if self.family == "bert" and self.tied is False:
            raise ValueError("tied=false: the MLM head of bert is tied to its embedding; leave it out")
        if self.mlp is not None and self.mlp_ratio is not None:
            raise ValueError("mlp and mlp_ratio are both given; give one of them")
        return self


class TokenizerConfig(Section):
    """The tokenizer; trained on the first domain when there is no path."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    """The library that trains and reads it."""
    path: str | None = None
    """A folder with ``tokenizer.model``, or the file."""
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    """Pieces of a trained tokenizer (byte pieces included)."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """How pieces are chosen when it is trained."""


class PromptsConfig(Section):
    """The soft prompt in front of every sequence: its own domain's rows."""

    tokens: NonNegative = 1
    """Rows per domain; 0 for none."""


class MemoryConfig(Section):
    """What is kept of each finished domain, and how much of every batch it takes."""

    tokens: Positive = 200_000
    """Text tokens kept of each domain's training text."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of every global batch that comes from the memories of earlier domains."""


class GrowthConfig(Section):
    """How the model grows between domains (growth.md)."""

    width: str = "auto"
    """How embed, heads and MLP units are mapped. ``auto``: ``zero_pad`` (llama); otherwise ``replicate`` for a whole
    multiple of the width, else ``lemon`` (gpt) or ``weighted`` (bert, and norms that are weighted already). Exact:
    ``replicate``, ``weighted``, ``iso``, ``lemon``, ``zero_pad``, ``blockdiag``. Not exact, and accepted by their name:
    ``sparkling`` (exact for whole multiples), ``aki``, ``elle`` (the paper's random maps and copy noise)."""
    depth: str = "auto"
    """How layers are added. ``auto``: ``zero_out`` for pre-norm, ``gate`` for post-LN. Also for post-LN:
    ``affine_migrate``. Not exact, and accepted by their name: ``stack``, ``interleave``, ``solar``, ``elle``."""
    moments: Literal["auto", "scaled", "asym_reset", "reset"] = "auto"
    """Adam's moments: mapped with the weights, mapped for originals and zero for copies, or dropped. ``auto``: what the
    strategies go with, ``scaled`` for all exact ones."""
    rate: Literal["auto", "keep", "mup", "rewarm", "asym_rewarm"] = "auto"
    """Learning rates after growth. ``mup``: each entry's rate and epsilon scaled so that training goes on as that of
    the smaller model would; ``rewarm``: all rates rise from 0; ``asym_rewarm``: those of copies rise from 0 to 1.3
    times the rate. ``auto``: ``asym_rewarm`` for ``sparkling``, ``keep`` otherwise."""
    rewarm_steps: Positive = 250
    """Steps over which rates rise under ``rewarm`` and ``asym_rewarm``."""
    freeze_old: NonNegative = 0
    """Steps after a growth in which only what was added learns."""
    noise_db: Annotated[float, Field(ge=-20, le=120)] | None = 20.0
    """Signal-to-noise ratio of the zero-sum noise that separates copies; ``null`` for none."""
    anneal: NonNegative = 0
    """Steps over which weighted norm statistics become uniform again after a growth; 0 for never."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: matrices and tables, or also biases and norms (fairseq, and so the paper)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    schedule: Literal["linear", "cosine", "inverse_sqrt", "wsd", "constant"] = "linear"
    """How the rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.08
    """Share of the steps over which the rate rises from 0."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """``wsd``: the last share of the steps, over which the rate falls."""
    min_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The lowest rate, as a share of the peak (``linear``, ``cosine``, ``wsd``)."""
    restart: Literal["phase", "never"] = "phase"
    """Whether the schedule starts anew in each phase, or runs once over the whole stream."""

    @model_validator(mode="after")
    def _sane(self) -> OptimConfig:
        for index, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}]={beta} is not in [0, 1)")
        if self.schedule == "inverse_sqrt" and self.warmup == 0:
            raise ValueError("schedule inverse_sqrt needs warmup above 0: the rate falls from the end of it")
        return self


class BatchConfig(Section):
    """Sequences per step."""

    global_: Positive = Field(64, alias="global")
    """Over all ranks."""
    micro: Positive = 16
    """Per rank at a time; gradients accumulate over the rest."""


class ParallelConfig(Section):
    """The layout: how the ranks share the model and the batch."""

    tp: Positive = 1
    """Tensor parallel ranks."""
    pp: Positive = 1
    """Pipeline ranks: each holds a run of the layers, or ``virtual_stages`` runs."""
    cp: Positive = 1
    """Context parallel ranks: each holds a part of every sequence; keys and values are gathered in attention."""
    dp_shard: Positive = 1
    """Ranks that share the parameters (FSDP2)."""
    dp_replicate: Positive | Literal["auto"] = "auto"
    """Replicas; ``auto`` takes the ranks that are left."""
    idle_ranks: bool = False
    """Let ranks that the layout has no use for wait (a first stage that is smaller than the job). Otherwise they are
    an error."""
    sequence_parallel: bool = False
    """Between attention and MLP each tensor parallel rank holds a part of the sequence (saves activations)."""
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"] = "1f1b"
    """Of the pipeline. ``interleaved_1f1b`` and ``zero_bubble`` give each rank ``virtual_stages`` runs of layers,
    ``zbv`` two, in the shape of a V."""
    virtual_stages: Positive = 2
    """Runs of layers on a pipeline rank (``interleaved_1f1b``, ``zero_bubble``)."""
    split: Literal["estimated", "measured"] | tuple[Positive, ...] = "estimated"
    """Layers of each pipeline stage, in order; ``estimated``: so that the slowest stage, head included, has the fewest
    operations; ``measured``: so that it takes the least time, embeddings and head included, by what they and a layer
    are seen to take before a stage of the stream begins."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass instead of kept: none, those of the MLP, or all of a
    layer's but its input."""
    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """What shards the data-parallel state: PyTorch's FSDP2, or DeepSpeed's ZeRO."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards: optimizer state; gradients, too; parameters, too."""
    offload: bool = False
    """Keep DeepSpeed's optimizer state in the host's memory and update it there."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """What updates it there: torch's fused AdamW, or the kernel of DeepSpeedCPUAdam, which is built when it is first
    used (minutes). Where it cannot be built, torch's takes its place."""
    apex: bool = False
    """Take NVIDIA apex's FusedAdam and FusedLayerNorm in place of torch's (GPUs; apex built with its kernels)."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward (saves memory, gathers twice); ``zero_bubble`` and ``zbv``
    always keep them."""
    first_timeout: Annotated[float, Field(gt=0, le=1e6)] = 1800.0
    """Seconds that ranks wait for each other while the job starts, in the first step of a phase and after anything but
    a step, and for growth, evaluation and checkpoints. A longer wait is a hang: all say where they are, and end."""
    step_timeout: Annotated[float, Field(gt=0, le=1e6)] = 300.0
    """The same in all other steps."""
    check_every: NonNegative = 0
    """Steps between checks that what should be equal on several ranks (replicas, what ``tp`` does not cut, both copies
    of a tied table) is so to the last bit; also before each checkpoint. 0 for never."""
    world_size: Positive | None = None
    """Ranks that ``pretrain --dry-run`` counts with; a run counts those that it has."""

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds a pipeline stage."""
        turn, place = divmod(stage, self.pp)
        return self.pp - 1 - place if self.schedule == "zbv" and turn % 2 else place

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of one pipeline rank."""
        if self.pp == 1:
            return 1
        return {"interleaved_1f1b": self.virtual_stages, "zero_bubble": self.virtual_stages, "zbv": 2}.get(
            self.schedule, 1
        )


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Positive = 200
    """Steps between checkpoints; phases end with one too."""
    keep: Positive = 2
    """How many of them stay; those at the end of a stage always do."""
    background: bool = True
    """Copy what is saved and write it while training goes on; takes as much host memory as a rank's part of it."""


class EvalConfig(Section):
    """Perplexity on the valid text of every seen domain."""

    every: NonNegative = 200
    """Steps between evaluations while training; 0 for only at the end of phases."""
    batches: Positive = 20
    """Batches of each domain, of ``batch.micro`` sequences."""


class LogConfig(Section):
    """What is written while training."""

    every: Positive = 10
    """Steps between lines of ``metrics.jsonl``."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


class GrowConfig(Section):
    """New sizes of a stage; what is left out stays (the MLP follows the width by its ratio)."""

    layers: Positive | None = None
    """Transformer layers."""
    heads: Positive | None = None
    """Query heads; the width grows with them unless ``model.width`` or ``width`` is given."""
    kv_groups: Positive | None = None
    """Key/value heads (``llama``)."""
    head_dim: Positive | None = None
    """Channels of a head; the width grows with them unless ``model.width`` or ``width`` is given."""
    width: Positive | None = None
    """Width of the residual stream; from then on it no longer follows heads and ``head_dim``."""
    mlp: Positive | None = None
    """Inner width of the MLP."""
    seq_len: Positive | None = None
    """Positions, the prompt's included. The text of this and later stages is cut into samples that fill them, valid
    text too, and the memories are chosen anew at that length (from all training text, ``memory.tokens`` as before)."""
    vocab: Positive | None = None
    """Ids of the model, those of the tokenizer and reserved ones; see ``model.vocab``."""


class RecoverConfig(Section):
    """Training on the memories of all earlier domains, right after growth."""

    steps: NonNegative = 0
    """Steps of the phase; 0 for none."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of the phase; the stage's when not given."""
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the schedule over which the rate rises; the stage's when not given."""
    schedule_steps: Positive | None = None
    """Length of the schedule when longer than the phase (the paper cuts its schedule short)."""


class StageConfig(Section):
    """One domain of the stream."""

    domain: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]
    """Its name: letters, digits, ``_ . -``; every stage has its own."""
    data: Annotated[str, Field(min_length=1)]
    """``.jsonl``, ``.txt``, a folder with ``train``/``valid``, a ``.bin/.idx`` prefix, or ``builtin:NAME``."""
    steps: Positive
    """Steps on the domain, replay included."""
    grow: GrowConfig | None = None
    """New sizes, taken on before the stage begins; none for the first stage."""
    recover: RecoverConfig = RecoverConfig()
    """Training on the memories before the stage's own text."""
    parallel: dict[str, Any] = {}
    """Overrides of ``parallel`` for this stage."""
    batch: dict[str, Any] = {}
    """Overrides of ``batch`` for this stage."""
    optim: dict[str, Any] = {}
    """Overrides of ``optim`` for this stage."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    prompts: PromptsConfig = PromptsConfig()
    memory: MemoryConfig = MemoryConfig()
    growth: GrowthConfig = GrowthConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig.model_validate({})
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Of the computation; masters are fp32 (fp64 in fp64 runs)."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    stream: Annotated[tuple[StageConfig, ...], Field(min_length=1)]

    def stage_data(self, stage: int) -> str:
        """Where a stage's text is: ``builtin:NAME``, or a path with ``run.data`` in front when it is relative."""
        data = self.stream[stage].data
        return data if data.startswith("builtin:") or not self.run.data else str(Path(self.run.data) / data)

    def stage_model(self, stage: int) -> ModelConfig:
        """The model's sizes in stage ``stage``, all growths up to it applied."""
        model = self.model
        for item in self.stream[: stage + 1]:
            if item.grow is not None:
                model = grown(model, item.grow)
        return model

    def stage_parallel(self, stage: int) -> ParallelConfig:
        """The layout of a stage, its overrides applied."""
        return ParallelConfig.model_validate(self.parallel.model_dump() | self.stream[stage].parallel)

    def stage_batch(self, stage: int) -> BatchConfig:
        """The batch of a stage, its overrides applied."""
        return BatchConfig.model_validate(self.batch.model_dump(by_alias=True) | self.stream[stage].batch)

    def stage_optim(self, stage: int) -> OptimConfig:
        """The optimizer of a stage, its overrides applied."""
        return OptimConfig.model_validate(self.optim.model_dump() | self.stream[stage].optim)

    @property
    def text_length(self) -> int:
        """Text positions of a sequence in the first stage: what the prompt leaves of ``model.seq_len``."""
        return self.model.seq_len - self.prompts.tokens

    def stage_text_length(self, stage: int) -> int:
        """Text positions of a sequence in a stage."""
        return self.stage_model(stage).seq_len - self.prompts.tokens


def grown(model: ModelConfig, grow: GrowConfig) -> ModelConfig:
    """The sizes after one growth; pydantic checks them as it checked the first ones."""
    update = {key: value for key, value in grow.model_dump().items() if value is not None}
    fields = model.model_dump()
    if "mlp" in update:
        fields["mlp_ratio"] = None
    return ModelConfig.model_validate(fields | update)


def nearest_divisors(total: int, wanted: int) -> str:
    """The divisors of ``total`` next to ``wanted``, for a message: ``"4 or 8"``."""
    divisors = [value for value in range(1, total + 1) if total % value == 0]
    below = [value for value in divisors if value < wanted][-1:]
    above = [value for value in divisors if value > wanted][:1]
    return " or ".join(str(value) for value in below + above)


def nearest_multiples(step: int, wanted: int) -> str:
    """The positive multiples of ``step`` next to ``wanted``, for a message: ``"6 or 8"``."""
    below = wanted // step * step
    values = [below] * (below > 0) + [below + step]
    return " or ".join(str(value) for value in values)
