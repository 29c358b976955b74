"""The recipe of ``softprompts pretrain``: corpus, tokenizer, model and training run of a small LM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softprompts.cache_folder import member_folder
from softprompts.errors import ConfigError, nearest

__all__ = [
    "CorpusConfig",
    "LMConfig",
    "LMOptimizerConfig",
    "LMTrainingConfig",
    "ObjectiveConfig",
    "OutputConfig",
    "PretrainRecipe",
    "SourceConfig",
    "TokenizerConfig",
]

_OBJECTIVES = {"decoder": ("causal",), "encoder_decoder": ("span_corruption", "prefix_lm")}


@dataclass(frozen=True)
class SourceConfig:
    """One ingredient of the corpus mix."""

    name: str
    files: tuple[str, ...]
    """JSONL or plain text, gzipped or not; relative paths are looked up below the data folder."""
    weight: float
    """Share of the mix in characters, relative to the other sources' weights."""
    objective: str = "plain"
    """What becomes of a text: a name known to ``softprompts.pretraining.objectives.OBJECTIVES``."""
    unwrap: bool = False
    """Join lines that were broken at a fixed width."""
    text_field: str = "text"
    license: str = "unstated"
    """Copied into the model card."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or not self.files:
            raise ConfigError(
                f"source '{self.name}' has weight {self.weight} and {len(self.files)} files; expected a positive "
                "weight and at least one file; remove the source to leave it out"
            )


@dataclass(frozen=True)
class CorpusConfig:
    """What is read, how it is mixed and how much of it becomes tokens."""

    sources: tuple[SourceConfig, ...]
    data_dir: str | None = None
    """Folder of relative paths; ``None`` takes the environment variable SOFTPROMPTS_DATA."""
    tokens: int = 50_000_000
    """Size of the token file; sources that are too small for their share are read again."""
    max_characters: int = 1800
    """Longer texts are cut into documents of about this size at paragraph or sentence ends."""
    held_out_permille: int = 10
    """Share of the documents, chosen by a hash of their text, that is never trained on."""
    held_out_tokens: int = 200_000
    """Most held-out tokens that are kept per source."""
    max_epochs: int = 8
    """How often a small source may be read again; after that the others fill its share."""
    seed: int = 0


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE with single digits, as in Llama."""

    vocab_size: int = 6144
    training_characters: int = 20_000_000
    min_frequency: int = 2


@dataclass(frozen=True)
class LMConfig:
    """Shape of the Llama-type decoder or of the T5-type encoder-decoder; the embeddings are tied."""

    kind: Literal["decoder", "encoder_decoder"] = "decoder"
    """``encoder_decoder``: T5 v1.1 (gated GELU, relative positions, no biases), no dropout, tied embeddings."""
    width: int = 256
    layers: int = 8
    """Of an encoder-decoder: those of its encoder."""
    decoder_layers: int | None = None
    """Only for ``encoder_decoder``; ``None``: as many as ``layers``."""
    heads: int = 4
    kv_heads: int | None = None
    """``None``: as many as ``heads``. Only for ``decoder``."""
    mlp_width: int = 704
    context: int = 512
    """Longest row in tokens; for an encoder-decoder, whose positions are relative, the text that a pair is made of."""
    rope_theta: float = 10_000.0
    """Only for ``decoder``."""
    init_std: float = 0.02
    """Only for ``decoder``; an encoder-decoder starts as T5 does."""
    start_layers: int | None = None
    """Layers of the model that ``training.start_from`` names, if this one is deeper: its blocks are spread over the
    layers, and those between begin as copies that add nothing (block expansion, Wu et al. 2024). ``None``: as many as
    ``layers``."""

    def __post_init__(self) -> None:
        decoder_only = {"kv_heads": self.kv_heads}
        pair_only = {"decoder_layers": self.decoder_layers}
        for key, value in (decoder_only if self.kind == "encoder_decoder" else pair_only).items():
            if value is not None:
                raise ConfigError(f"model.{key} is {value}, but a model of kind '{self.kind}' has none; leave it out")
        if self.width % self.heads:
            raise ConfigError(f"model.width is {self.width}, expected a multiple of model.heads {self.heads}")
        fewest = min(self.layers, self.decoder_layers or self.layers)
        if self.start_layers is not None and not 1 <= self.start_layers < fewest:
            raise ConfigError(
                f"model.start_layers is {self.start_layers}, expected at least 1 and fewer than each of its stacks "
                f"has ({fewest}); leave it out if training.start_from has as many layers"
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned from a row of text (what becomes of a text before is ``corpus.sources[].objective``)."""

    name: Literal["causal", "span_corruption", "prefix_lm"] | None = None
    """``causal`` for decoders; for encoder-decoders ``span_corruption`` (T5) or ``prefix_lm`` (LM adaptation: a text is
    cut at a random point, the encoder reads the first part, the decoder says the rest). ``None``: the first that fits
    ``model.kind``."""
    noise_density: float = 0.15
    """``span_corruption``: share of the tokens that are replaced by sentinels."""
    mean_span_length: float = 3.0
    """``span_corruption``: mean number of tokens behind one sentinel."""
    target_tokens: int | None = None
    """``prefix_lm``: tokens that the decoder learns per row; the cut lies 1 to ``context - target_tokens`` tokens
    behind the row's start. ``None``: half the context."""
    sentinels: int | None = None
    """Sentinels of the tokenizer; ``None``: as many as a row needs. A model that is adapted on
    longer rows than it was pretrained on needs the same number."""

    def __post_init__(self) -> None:
        if not 0.0 < self.noise_density < 1.0 or self.mean_span_length < 1.0:
            raise ConfigError(
                f"objective.noise_density is {self.noise_density} and objective.mean_span_length "
                f"{self.mean_span_length}; expected a share between 0 and 1 and a length of at least 1"
            )


@dataclass(frozen=True)
class LMOptimizerConfig:
    """Muon or AdamW for the matrices; AdamW for embeddings and norms."""

    matrices: Literal["muon", "adamw"] = "muon"
    matrix_learning_rate: float = 0.02
    learning_rate: float = 3e-3
    """Of embeddings and norms."""
    weight_decay: float = 0.05
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0


@dataclass(frozen=True)
class LMTrainingConfig:
    """How long, in what batches, at what precision."""

    total_tokens: int = 30_000_000
    """Where the schedule ends. Lower or raise it while resuming: ``wsd`` decays accordingly."""
    batch_rows: int = 16
    micro_batch_rows: int | None = None
    """Rows per backward pass; ``None``: all at once."""
    row_tokens: int | None = None
    """Train on rows shorter than the context: cheaper attention, more rows, as many tokens a step. For a first phase;
    positions past the rows are learned only by rows as long as the context. ``None``: the context."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    """``wsd``: the last share of the steps, over which the rate falls linearly to zero."""
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    device: str = "auto"
    seed: int = 0
    start_from: str | None = None
    """Weights to start from instead of random ones: a folder in Hugging Face format, the output folder of a finished
    run, ``family/NAME`` or ``bundled``. Same shape (for a deeper one say ``model.start_layers``) and tokenizer;
    the optimizer starts anew."""

    def __post_init__(self) -> None:
        if self.batch_rows % (self.micro_batch_rows or self.batch_rows):
            raise ConfigError(
                f"batch_rows {self.batch_rows} is no multiple of micro_batch_rows {self.micro_batch_rows}; "
                "every backward pass must have the same size"
            )
        if self.row_tokens is not None and self.row_tokens < 2:
            raise ConfigError(f"row_tokens is {self.row_tokens}, expected a divisor of the context, at least 2")
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ConfigError(f"decay_fraction is {self.decay_fraction}, expected a share between 0 and 1")

    @property
    def micro_batches(self) -> int:
        """Backward passes per step."""
        return self.batch_rows // (self.micro_batch_rows or self.batch_rows)


@dataclass(frozen=True)
class OutputConfig:
    """Where things go, and how often."""

    output_dir: str = "runs/pretrain"
    checkpoint_every_s: float = 240.0
    export_every_s: float = 600.0
    """How often held-out loss is measured and ``latest/`` (Hugging Face format) is replaced."""
    log_every_steps: int = 10
    evaluation_rows: int = 8
    """Most rows per source in the periodic held-out loss."""
    final_evaluation_rows: int | None = 96
    """Most rows per source in the final one; ``None``: all."""
    resume_from: Literal["latest", "stable"] = "latest"
    """``stable``: the checkpoint from before the decay, to train on for more tokens."""
    tokens_dir: str | None = None
    """Where the token file lies; ``None``: ``tokens/`` in ``output_dir``; ``cache``: in the user's cache folder, where
    every run on the same corpus and tokenizer finds it."""
    keep_at_steps: tuple[int, ...] = ()
    """Steps after which the model is kept in ``step-N/`` (Hugging Face format)."""
    publish_as: str | None = None
    """Copy the final model to the user's cache folder, where ``family/<this name>`` finds it."""
    publish_steps_as: str | None = None
    """Copy the kept models there, under this name with 1, 2, ... behind it, in the order of their steps."""

    def __post_init__(self) -> None:
        if list(self.keep_at_steps) != sorted(set(self.keep_at_steps)) or min(self.keep_at_steps, default=1) < 1:
            raise ConfigError(f"output.keep_at_steps is {list(self.keep_at_steps)}, expected rising numbers from 1")
        for name in (self.publish_as, self.publish_steps_as):
            if name is not None:
                member_folder(name)  # refuses what is no name


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that ``softprompts pretrain`` needs to know."""

    corpus: CorpusConfig
    name: str = "softprompts-lm"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: LMConfig = field(default_factory=LMConfig)
    optimizer: LMOptimizerConfig = field(default_factory=LMOptimizerConfig)
    training: LMTrainingConfig = field(default_factory=LMTrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        kind, name = self.model.kind, self.objective.name
        known = _OBJECTIVES[kind]
        if name is not None and name not in known:
            raise ConfigError(f"objective.name '{name}' is not for model.kind '{kind}': {nearest(name, known)}")
        if kind == "encoder_decoder" and self.training.row_tokens is not None:
            raise ConfigError(
                "training.row_tokens is for decoders; for an encoder-decoder choose a shorter model.context"
            )
        target = self.objective.target_tokens
        if target is not None and not 1 <= target < self.model.context:
            raise ConfigError(
                f"objective.target_tokens is {target}, expected at least 1 and less than model.context "
                f"{self.model.context}"
            )
        if self.model.start_layers is not None and self.training.start_from is None:
            raise ConfigError("model.start_layers says how deep training.start_from is, which is missing; name a model")
        row = self.training.row_tokens
        if row is not None and self.model.context % row:
            raise ConfigError(
                f"training.row_tokens is {row}, expected a divisor of model.context {self.model.context}, "
                "so that every step has the same number of tokens"
            )

    @property
    def objective_name(self) -> str:
        """What is learned: the name given, or the first that fits the kind of model."""
        return self.objective.name or _OBJECTIVES[self.model.kind][0]
