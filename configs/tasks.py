"""What a process does: one dataclass for each task. What carries them out is `launch/tasks/`."""

import enum
from dataclasses import dataclass, field

from configs.sweeps import SweepSearchConfig
from models.config import Dtype
from trainer.reliability.watchdog import WatchdogAction


@dataclass
class TaskConfig:
    """What a process does; the first word of the command line."""

    kind: str = ""  # Name of the task, set by the first word of the command line


class Format(enum.Enum):
    table = "table"  # for people
    json = "json"  # for programs


@dataclass
class ReportTaskConfig(TaskConfig):
    """Shared by tasks that print a result."""

    format: Format = Format.table  # Output format


@dataclass
class RunReaderConfig(TaskConfig):
    """Shared by tasks that read a checkpoint of a run."""

    step: int | None = None  # Optimizer step of the checkpoint to read; null: the newest


@dataclass
class TrainConfig(TaskConfig):
    kind: str = "train"
    # Optimizer steps in total, including those before a resume
    num_steps: int = field(default=1000, metadata={"min": 1})
    # Number of microbatches that each batch is split into; they are processed one after the other
    gradient_accumulation_steps: int = field(default=1, metadata={"min": 1})
    # Optimizer steps between log lines, where the output is no terminal
    log_every: int = field(default=10, metadata={"min": 1})
    eval_every: int = 0  # Optimizer steps between evaluations on validation text; 0: only at the end
    sample_every: int = 0  # Optimizer steps between text samples; 0: only at the end
    sample_prompt: str = ""  # Prompt of the text samples
    sample_tokens: int = 128  # Length of a text sample in tokens; 0: no samples
    sample_temperature: float = 0.7  # Sampling temperature of the text samples; 0: greedy
    early_stopping_patience: int = 0  # Evaluations without improvement before early stopping; 0: never
    early_stopping_min_delta: float = 0.0  # Least decrease of the loss that counts as improvement, in nats
    # Seconds without progress (a step, an evaluation or a save) after which the run hangs; 0: never
    watchdog_timeout: float = field(default=1800.0, metadata={"min": 0, "hint": "0 disables the watchdog"})
    watchdog_action: WatchdogAction = WatchdogAction.warn  # Action when the run hangs
    # Optimizer steps to profile, [first, last]; the trace is written to profile/ in the run folder
    profile_steps: list[int] = field(default_factory=list)


@dataclass
class PlanConfig(TrainConfig, ReportTaskConfig):
    """Of a run that `train` would start: what stands in `TrainConfig` is planned with."""

    kind: str = "plan"
    target: str = "cpu"  # Devices to plan for, as KIND-COUNT: v5p-512, v6e-256, h100x64, 2*v5e-256 for slices, cpu
    compile: bool = False  # Compile the step for the target as well, and report what XLA allocates
    search: bool = False  # Search for the mesh, the remat policy and the number of microbatches as well
    num_tokens: float | None = None  # Training tokens, for the estimated days and cost; null: those of num_steps
    # JSON file of a ladder to recommend a size by; null: the law of Hoffmann et al. 2022
    scaling_law: str | None = None
    # Price of one device, in dollars per hour; null: that of launch/planning/hardware.py
    price_per_device_hour: float | None = None
    output: str | None = None  # Folder for the plan and its picture; null: RUNS/plans


@dataclass
class SweepConfig(TrainConfig):
    """Of runs that `train` would start, which differ in `sweep.parameters`: what stands in `TrainConfig` is of each."""

    kind: str = "sweep"
    sweep: SweepSearchConfig = field(default_factory=SweepSearchConfig)  # Search over the keys that vary


@dataclass
class CoordCheckConfig(ReportTaskConfig):
    """Of a run that `train` would start, at several widths."""

    kind: str = "coord_check"
    # Values of embed_dim to compare; all other sizes scale with it
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    num_steps: int = 4  # Optimizer steps at each width, at the peak learning rate
    tolerance: float = 0.3  # Largest absolute slope that counts as transfer
    output: str | None = None  # Folder for the numbers and the picture; null: RUNS/coordinates


@dataclass
class ScalingLadderConfig(TrainConfig, ReportTaskConfig):
    """Runs of several sizes and lengths: what stands in `TrainConfig` is of each of them, `num_steps` aside."""

    kind: str = "scaling_ladder"
    # Values of embed_dim to train; all other sizes scale with it
    widths: list[int] = field(default_factory=lambda: [64, 96, 128, 192])
    aspect_ratio: float | None = None  # Width divided by the number of layers; null: every size is as deep as the model
    # Training tokens per parameter, a run for each; a single value gives a law of compute alone
    tokens_per_param: list[float] = field(default_factory=lambda: [10.0, 20.0, 40.0])
    # Training FLOPs to recommend a size for; null: 100 times those of the largest run
    compute_budget: float | None = None
    output: str | None = None  # Folder for the numbers and the picture; null: RUNS/ladders


@dataclass
class PrepareConfig(TaskConfig):
    kind: str = "prepare"


@dataclass
class EvaluateConfig(RunReaderConfig, ReportTaskConfig):
    kind: str = "evaluate"
    max_eval_batches: int = 0  # Batches of each source; 0: data.max_eval_batches
    # JSONL files of multiple-choice problems to evaluate on, instead of sources
    eval_tasks: list[str] = field(default_factory=list)
    limit: int = 0  # Problems of each file, from its start; 0: all
    limit_per_group: int = 0  # Problems of each part of a file that has parts; 0: all
    # Special token before texts without a context; null: none, and their first token is not scored
    prefix: str | None = None
    dtype: Dtype | None = None  # Dtype of the computation; null: that of the run


@dataclass
class GenerateConfig(RunReaderConfig, ReportTaskConfig):
    kind: str = "generate"
    prompt: str | None = None  # Text to continue
    chat: str | None = None  # User message to answer, through the run's chat template
    max_new_tokens: int = 256  # Tokens to generate at most
    temperature: float = 0.7  # Sampling temperature; 0: greedy
    top_k: int = 0  # Number of most probable tokens to sample from; 0: all
    top_p: float = 1.0  # Probability mass of the most probable tokens to sample from (nucleus sampling); 1: all
    min_p: float = 0.0  # Least probability of a token, relative to the most probable one; 0: none
    repetition_penalty: float = 1.0  # Penalty on tokens that occurred before, as a factor; 1: none
    stop: list[str] = field(default_factory=list)  # Texts that end a completion; they are not printed
    diffusion_steps: int = 0  # Denoising steps of a masked diffusion model; 0: one for each token
    prompts: list[str] = field(default_factory=list)  # Several prompts, of any lengths
    prompt_file: str | None = None  # File of prompts, one per line
    num_samples: int = 1  # Completions of each prompt
    system: str | None = None  # System message of a chat
    # JSON file of a conversation to continue: a list of messages, or {messages, tools}
    messages_file: str | None = None


@dataclass
class ServeConfig(RunReaderConfig):
    kind: str = "serve"
    host: str = "127.0.0.1"  # Address to listen on; one that other machines can reach requires api_key_env
    port: int = 8000  # TCP port; 0: a free one
    api_key_env: str | None = None  # Environment variable with the API key that clients must send
    max_num_seqs: int = 16  # Requests generated at once
    # Tokens of a prompt and its completion at most; null: model.max_seq_len, at most 4096
    max_model_len: int | None = None
    max_queue_size: int = 64  # Requests that may wait for a slot; further ones get status 429
    timeout: float = 600.0  # Seconds until a request times out, including its wait
    max_request_bytes: int = 1_000_000  # Size of a request body at most, in bytes; larger ones get status 413
    shutdown_timeout: float = 10.0  # Seconds to finish open requests after SIGTERM


@dataclass
class PredictConfig(RunReaderConfig):
    kind: str = "predict"
    texts: list[str] = field(default_factory=list)  # Texts to score
    # Files to score: .txt with a text per line, .jsonl with a text or a conversation per line
    files: list[str] = field(default_factory=list)
    output: str | None = None  # Output file, .jsonl or .npy; null: JSON lines on standard output
    batch_size: int = 16  # Texts per batch


@dataclass
class InspectConfig(RunReaderConfig, ReportTaskConfig):
    kind: str = "inspect"


@dataclass
class RunsConfig(ReportTaskConfig):
    kind: str = "runs"


@dataclass
class ReplayConfig(ReportTaskConfig):
    """Of a rollback (`loss_spikes.policy=rollback`): the updates before it, once more."""

    kind: str = "replay"
    rollback: str | None = None  # Incident to replay, by the name STEP-N of its file in incidents/; null: the newest
    rows: int = 5  # Rows of the batch to print, those with the largest loss


@dataclass
class ConvertConfig(RunReaderConfig):
    kind: str = "convert"
    input: str | None = None  # Checkpoint to convert: hf:FOLDER, gguf:FILE, peft:FOLDER, or a run as NAME or NAME@STEP
    output: str | None = None  # Name of the new run, or hf:FOLDER, gguf:FILE, or peft:FOLDER for adapters alone
    # Dtype of the output: float32, float16, bfloat16, in a GGUF file also q8_0, q4_0; null: that of the origin
    dtype: str | None = None
    max_shard_size_gb: float = 5.0  # Size of each weight file at most, in gigabytes


@dataclass
class StatusConfig(TaskConfig):
    """Of the newest job of a run, as the two below."""

    kind: str = "status"


@dataclass
class LogsConfig(TaskConfig):
    kind: str = "logs"
    follow: bool = False  # Wait for new lines


@dataclass
class StopConfig(TaskConfig):
    kind: str = "stop"


TASKS: dict[str, type[TaskConfig]] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "sweep": SweepConfig,
    "coord_check": CoordCheckConfig,
    "scaling_ladder": ScalingLadderConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "predict": PredictConfig,
    "inspect": InspectConfig,
    "runs": RunsConfig,
    "replay": ReplayConfig,
    "convert": ConvertConfig,
    "status": StatusConfig,
    "logs": LogsConfig,
    "stop": StopConfig,
}

# Names of a task's keys that no Python field can have.
ALIASES: dict[str, dict[str, str]] = {"convert": {"from": "input", "to": "output"}}
