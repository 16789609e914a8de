"""The whole configuration as one typed tree of plain dataclasses.

Only the standard library is imported here, so that models and MCMC can use their sections without OmegaConf.
What a single key accepts is declared here, by `fields.py`, and in `services.py` for what surrounds a training;
conditions that span several keys are in `checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ebwm_dist.config.fields import choice, location, number
from ebwm_dist.config.noise import NoiseConfig
from ebwm_dist.config.services import ClusterConfig, EvaluationConfig, ProfileConfig, TensorboardConfig, WandbConfig


@dataclass
class ModelConfig:
    """Shape of the transformer, shared by the energy model and its autoregressive twin."""

    kind: str = choice("ebt", "ar", "dit")
    """`ebt`: energy-based transformer; `ar`: autoregressive Transformer++ built from the same blocks; `dit`: diffusion
    transformer of embeddings, from the same blocks too."""
    variant: str = choice("default", "time_embed", "adaln")
    """Conditioning of the energy on the MCMC step: none, a learned token before the context, or adaptive norms."""
    num_landscapes: int = number(1, at_least=1)
    """Number of trained step conditionings; later steps repeat the last one. Always 1 for `default`."""
    embedding_dim: int | None = number(None, at_least=1)
    """Width E of the frame embeddings that are predicted; null: the tokens of a vocabulary are."""
    vocab_size: int = number(50277, at_least=2)
    """Size of the vocabulary; must equal that of the tokenizer the data was made with. Unused with `embedding_dim`."""
    dim: int = number(384, at_least=1)
    """Width D of the residual stream."""
    num_layers: int = number(6, at_least=1)
    """Number of transformer blocks."""
    num_heads: int = number(6, at_least=1)
    """Number of attention heads; must divide `dim` into even head widths."""
    ffn_multiplier: float = number(1.0, above=0)
    """Hidden width of the SwiGLU feed-forward as a multiple of `dim` (the published recipes use 1)."""
    norm_eps: float = number(1e-5, above=0)
    """Epsilon of RMSNorm."""
    rope_base: float = number(10000.0, above=1)
    """Base of the rotary position embedding."""
    tie_embeddings: bool = False
    """Embed predictions with the token embedding of the context instead of a separate matrix."""
    energy_head: str = choice("linear", "bilinear", "distance")
    """Energy of a candidate e with the final hidden state h: `w h` (published); `(M h) e`, whose gradient holds M h as
    the logits of an autoregressive model do; or `|e - M h|^2 / 2`, which is high far away from M h."""
    add_most_recent: bool = False
    """Add the most recent observed state's embedding to that of every candidate, which otherwise only attends to it."""

    block_size: int = number(1, at_least=1)
    """Tokens P that are predicted together as one state, by candidates that see one another: patches of an image or a
    frame, cells of a puzzle. They share one energy, the mean over the tokens."""
    block_shape: list[int] | None = field(default=None, metadata={"limits": {"at_least": 1}})
    """Sizes of the axes of a block, with positions learned for each, such as [rows, columns]; null: `[block_size]`."""
    prefix: str = choice("token", "block", "none")
    """What samples begin with that is only observed: one token (the first of a text, or a label), a block such as the
    first frame, or nothing. `data.sequence_length` tokens follow that are predicted."""

    num_classes: int = number(0, at_least=0)
    """Classes of the images or clips, one of which samples begin with (`prefix: token`), or none of them; 0: the model
    knows no classes."""

    @property
    def prefix_length(self) -> int:
        """Number of tokens of a sample that are only observed."""
        return {"token": 1, "block": self.block_size, "none": 0}[self.prefix]

    @property
    def block_axes(self) -> list[int]:
        """Sizes of the axes of a block."""
        return self.block_shape or [self.block_size]

    @property
    def unit(self) -> str:
        """Name of what is counted: frames, where each is one embedding, otherwise tokens."""
        return "token" if self.embedding_dim is None or self.block_size > 1 else "frame"

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden width of the feed-forward."""
        return int(self.ffn_multiplier * self.dim)


@dataclass
class MCMCConfig:
    """Refinement of a prediction by gradient descent on its energy."""

    num_steps: int = number(2, at_least=1)
    """Number of MCMC steps in training; the fewest, where `max_num_steps` is set."""
    max_num_steps: int | None = number(None, at_least=1)
    """Draw the number of steps from `num_steps` to this for every micro-batch, the same on all ranks; null: no draw."""
    num_steps_warmup: int = number(0, at_least=0)
    """Optimizer steps over which the number of MCMC steps grows from 1."""
    step_size: float | Literal["auto"] = number(500.0, above=0)
    """Initial value of the step size alpha, which depends on width and vocabulary; `auto`: that with which the gradient
    of the fresh model moves logits by one (docs/tuning.md)."""
    learn_step_size: bool = True
    """Whether alpha is trained."""
    step_size_lr_multiplier: float | None = number(None, at_least=0)
    """Learning rate of alpha as a multiple of the model's, kept through the decay; null: 3 x `step_size`."""
    step_size_warmup: int = number(0, at_least=0)
    """Optimizer steps over which alpha grows to its full size."""
    step_size_jitter: float = number(1.0, at_least=1)
    """Multiply alpha by a factor drawn from [1 / this, this] for every sample and position in training."""
    langevin_noise: float = number(0.0, at_least=0)
    """Standard deviation of the noise added to the state before every step, in training and evaluation."""
    objective: str = choice("reconstruction", "contrastive")
    """`reconstruction`: the true next state is what the refinement should reach, trained through its gradients;
    `contrastive`: the true state should have a lower energy than refined and shuffled ones, a comparator."""
    num_negatives: int = number(1, at_least=0)
    """Shuffled states, besides the refined one, that each true state is contrasted with; used with `contrastive`."""
    loss: str = choice("mean", "last", "ramp")
    """Train on the mean of the losses after all steps, on the loss after the last one, or on a mean whose weights grow
    in proportion to the number of the step."""
    gradient: str = choice("truncated", "full")
    """`truncated`: the state that enters a step is a constant; `full`: gradients flow through all steps."""
    update: str = choice("probabilities", "logits", "mirror")
    """Next logits: `p - alpha dE/dp` (published code), `z - alpha dE/dz` (published text), `z - alpha dE/dp`.
    Embeddings have no probabilities and follow `x - alpha dE/dx`: the default has to stay."""
    initial_state: str = choice("random_noise", "zeros", "most_recent_embedding", "most_recent_token", "noised")
    """Initial state of a prediction: drawn from N(0, 1), zeros, or what was observed last: a copy of the embedding, or
    logits that are `initial_sharpness` for the token and 0 for all others; or `noised`: the true embedding with noise
    of the levels of `noise`, which the model learns to remove."""
    corrupted_share: float = number(0.0, at_least=0, at_most=1)
    """Share of the predictions that training starts at another frame of the sample instead of the last."""
    initial_sharpness: float = number(10.0, above=0)
    """Logit of the last observed token, where `initial_state` is `most_recent_token`."""
    replay_size: int = number(0, at_least=0)
    """Sequences per rank (with `training.position_parallel` per group) whose final states are kept, so that later
    refinements start from them; 0: none."""
    replay_top_k: int = number(1024, at_least=1)
    """Tokens whose probabilities are kept of a state, in 4 bytes each; the others share the rest evenly. Unused with
    `model.embedding_dim`."""
    replay_fraction: float = number(0.5, above=0, at_most=1)
    """Replayed sequences added to a micro-batch, as a fraction of its size."""

    @property
    def initial_step_size(self) -> float:
        """The number that `step_size` is, or 1 as long as that is to be found."""
        return 1.0 if self.step_size == "auto" else self.step_size

    @property
    def max_mcmc_steps(self) -> int:
        """The largest number of MCMC steps in training; validation takes as many."""
        return self.num_steps if self.max_num_steps is None else self.max_num_steps

    def replayed_rows(self, micro_batch_size: int) -> int:
        """Return the number of replayed sequences that are added to a micro-batch."""
        return int(micro_batch_size * self.replay_fraction) if self.replay_size else 0


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule, in optimizer steps."""

    kind: str = choice("adamw", "muon")
    """`muon`: Muon for the matrices of attention and feed-forward, AdamW for all else."""
    lr: float = number(1.2e-3, above=0)
    """Peak learning rate of the model; alpha's is `mcmc.step_size_lr_multiplier` times this."""
    muon_lr: float | None = number(None, above=0)
    """Peak learning rate of Muon's matrices, whose steps are scaled to the size of AdamW's; null: `optimizer.lr`."""
    muon_momentum: float = number(0.95, at_least=0, below=1)
    """Decay of Muon's (Nesterov) momentum."""
    betas: tuple[float, float] = number((0.9, 0.999), at_least=0, below=1)
    """AdamW's moment decays."""
    eps: float = number(1e-8, above=0)
    """AdamW's epsilon."""
    weight_decay: float = number(0.01, at_least=0)
    """Decoupled weight decay of every parameter but alpha, times the learning rate of the parameter."""
    grad_clip: float = number(1.0, at_least=0)
    """Largest global gradient norm; 0 does not clip."""
    schedule: str = choice("cosine", "wsd")
    """After the warm-up: cosine to `final_lr_ratio`, or stable and then linear to it (WSD)."""
    warmup_steps: int = number(10_000, at_least=0)
    """Steps of linear warm-up from 0, at most `training.max_steps`."""
    decay_steps: int | None = number(None, at_least=1)
    """Cosine: the step at which the decay ends; WSD: the length of the final decay. null: `training.max_steps`, and a
    tenth of it."""
    final_lr_ratio: float = number(0.1, at_least=0, at_most=1)
    """Learning rate at the end as a fraction of the peak."""


@dataclass
class TrainingConfig:
    """The training loop."""

    max_steps: int = number(1_000_000, at_least=1)
    """Optimizer steps of the whole run."""
    stop_after: int | None = number(None, at_least=1)
    """Save and exit after this step; the same command without it continues."""
    global_batch_size: int = number(256, at_least=1)
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: int = number(8, at_least=1)
    """Sequences per forward pass of one rank; the rest is gradient accumulation."""
    initialize_from: str | None = location(None)
    """Run, checkpoint or export (a path or an address) whose weights a new run begins with, alpha among them; a run
    that has a checkpoint of its own goes on from that instead."""
    initialize_vocabulary: str = choice("strict", "resize")
    """`strict`: the tokenizer must be the one that those weights were trained with; `resize`: it may have more or fewer
    tokens after the common ones, and new rows begin as in a fresh model."""
    precision: str = choice("fp32", "bf16")
    """`bf16` keeps fp32 master weights, optimizer state, MCMC states and losses."""
    position_chunk: int = number(128, at_least=1)
    """Positions of a sequence that are refined together: less takes less memory, more makes larger matrices."""
    position_parallel: int = number(1, at_least=1)
    """Neighbouring ranks that take the same sequences and share their positions: for more ranks than sequences, and for
    many MCMC steps. The global batch is divided among world / this groups of ranks."""
    activation_checkpointing: str = choice("none", "block")
    """`block`: keep only the inputs of each transformer block and compute the rest again in the backward."""
    attention: str = choice("auto", "math", "fused")
    """How candidates attend: by matrices of positions and context, or without them by Triton kernels (CUDA only);
    `auto`: by kernels where they work, unless blocks are compiled. The twin's attention is torch's own."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    max_nonfinite_steps: int = number(10, at_least=1)
    """Stop after this many skipped (non-finite) steps in a row."""
    log_interval: int = number(10, at_least=1)
    """Steps between two log lines; every step is in metrics.jsonl."""
    startup_timeout: float = number(1800.0, above=0)
    """Seconds until the first step must be done, loading and compiling included."""
    step_timeout: float = number(600.0, above=0)
    """Seconds without progress after the first step until a rank counts as hung."""

    @property
    def last_step(self) -> int:
        """The step after which the run exits."""
        return self.max_steps if self.stop_after is None else self.stop_after


@dataclass
class DataConfig:
    """The shards to train on: tokens, latents of video frames, or clips."""

    path: str = location("data/text")
    """Folder made by data_tools/tokenize_text.py (holds manifest.json), or its address (http(s)://, s3://, gs://, hf://),
    or `pipe:` and a command that writes the file named by its last argument, as in `pipe:ssh host cat folder`."""
    mixture: dict[str, float | list[tuple[int, float]]] = field(
        default_factory=dict, metadata={"limits": {"at_least": 0}, "location": True}
    )
    """Several such folders and their weights instead of `path`; the shares are exact over every 10,000 samples.
    A weight is a number, or points [[sample of the run, weight], ...]: linear between them, constant outside."""
    cache_dir: str = location(".cache/shards")
    """Where copies of remote files are kept; all processes of a machine may share it."""
    cache_gib: float = number(64.0, above=0)
    """Limit of their size in GiB; the least recently used ones are deleted first."""
    fetch_timeout: float = number(300.0, at_least=0)
    """Seconds that a run waits for remote files while their storage cannot be reached, before it ends."""
    sequence_length: int = number(256, at_least=1)
    """Tokens of context S, or frames of a clip less one; must equal the length the shards were made with."""
    encoder: str | None = None
    """Frozen encoder of the frames of clips, or of images: pixels:SIZE, pixels:SIZE/P, the same with grey instead of
    pixels, sd_vae(:P), dinov2(:patches) or torchvision:MODEL; null for text and latents, encoded in advance."""
    encoder_weights: str | None = location(None)
    """Local file or folder of the encoder's weights; `pixels` and `grey` have none."""
    min_crop_scale: float = number(1.0, above=0, at_most=1)
    """Augment clips by a random square crop, its side at least this share of the frame's, and by mirroring half of
    them; 1: no augmentation."""
    class_dropout: float = number(0.1, at_least=0, at_most=1)
    """Share of the training samples whose class is hidden, so that a model with `model.num_classes` also knows what to
    do without one."""
    shuffle_window: int = number(8, at_least=1)
    """Shards whose samples are shuffled together; only their index is held in memory."""
    num_workers: int = number(0, at_least=0)
    """Loader processes per rank; 0 reads in the training process. Does not change the order."""
    on_error: str = choice("fail", "skip")
    """A damaged training sample ends the run, or is replaced by the next intact one and counted."""
    log_sample_ids: bool = False
    """Write the keys of every global batch to samples.jsonl in the run folder."""


@dataclass
class ValidationConfig:
    """Validation on the held-out split."""

    interval: int = number(1000, at_least=1)
    """Steps between two validations; the last step is always validated."""
    max_sequences: int = number(2048, at_least=1)
    """At most this many held-out sequences, always the same ones."""
    curvature: bool = False
    """Also measure the energy's curvature, the largest eigenvalue of d2E/de2 in magnitude, before each MCMC step."""


@dataclass
class CheckpointConfig:
    """Sharded checkpoints of the whole training state."""

    interval: int = number(1000, at_least=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = number(3, at_least=1)
    """Number of newest checkpoints kept."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while the training goes on; false: train on once it is written."""
    resume: str = choice("auto", "never")
    """`auto`: continue from the run folder's newest intact checkpoint; `never`: refuse a run folder that has any."""
    remote: str | None = location(None)
    """Address (s3://bucket/path, gs://, file://) to which every checkpoint and the records of the run are copied in the
    background; a run folder that is behind it, or empty, continues from there."""


@dataclass
class ZeroConfig:
    """What DeepSpeed ZeRO shards over the ranks."""

    stage: int = field(default=1, metadata={"choices": (0, 1, 2, 3)})
    """0: nothing, 1: optimizer state, 2: and gradients, 3: and parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state on the CPU and step there (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep the parameters on the CPU until a block needs them (stage 3)."""


@dataclass
class Config:
    """Everything a run depends on."""

    run_dir: str = location("runs/default")
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, logs/."""
    seed: int = number(0, at_least=0, at_most=2**63 - 1)
    """Seed of the weights, the data order and the MCMC noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mcmc: MCMCConfig = field(default_factory=MCMCConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed keys, passed through unchanged; keys that this tree determines are refused."""

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up in this run, which may be shorter than `optimizer.warmup_steps`, as a trial is."""
        return min(self.optimizer.warmup_steps, self.training.max_steps)

    @property
    def mcmc_of_run(self) -> MCMCConfig:
        """`mcmc` with warm-ups that are no longer than this run."""
        longest, mcmc = self.training.max_steps, self.mcmc
        num_steps, step_size = min(mcmc.num_steps_warmup, longest), min(mcmc.step_size_warmup, longest)
        return replace(mcmc, num_steps_warmup=num_steps, step_size_warmup=step_size)
