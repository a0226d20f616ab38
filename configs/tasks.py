"""Task configs: one dataclass per task of the command line. `launch/tasks/` implements them."""

import enum
from dataclasses import dataclass, field

from configs.sweeps import SweepSearchConfig
from models.config import Dtype
from trainer.reliability.watchdog import WatchdogAction


@dataclass
class TaskConfig:
    """Base of all tasks; the first word of the command line selects one."""

    kind: str = ""  # name of the task, set by the first word of the command line


class Format(enum.Enum):
    table = "table"  # human-readable table
    json = "json"  # machine-readable JSON


@dataclass
class ReportTaskConfig(TaskConfig):
    """Base of tasks that print a result."""

    format: Format = Format.table  # output format


@dataclass
class RunReaderConfig(TaskConfig):
    """Base of tasks that read a checkpoint of a run."""

    step: int | None = None  # optimizer step of the checkpoint to read; null: the newest


@dataclass
class TrainConfig(TaskConfig):
    kind: str = "train"
    # total optimizer steps, including those before a resume
    num_steps: int = field(default=1000, metadata={"min": 1})
    # number of microbatches that each batch is split into; gradients are accumulated over them
    gradient_accumulation_steps: int = field(default=1, metadata={"min": 1})
    # optimizer steps between log lines if the output is not a terminal
    log_every: int = field(default=10, metadata={"min": 1})
    eval_every: int = 0  # optimizer steps between evaluations on validation data; 0: only at the end
    sample_every: int = 0  # optimizer steps between text samples; 0: only at the end
    sample_prompt: str = ""  # prompt of the text samples
    sample_tokens: int = 128  # length of a text sample in tokens; 0 disables samples
    sample_temperature: float = 0.7  # sampling temperature of the text samples; 0: greedy
    early_stopping_patience: int = 0  # evaluations without improvement before early stopping; 0 disables it
    early_stopping_min_delta: float = 0.0  # minimum decrease of the loss that counts as improvement, in nats
    # seconds without progress (a step, an evaluation or a save) before the watchdog acts; 0 disables it
    watchdog_timeout: float = field(default=1800.0, metadata={"min": 0, "hint": "0 disables the watchdog"})
    watchdog_action: WatchdogAction = WatchdogAction.warn  # action of the watchdog
    # optimizer steps to profile, [first, last]; the trace is written to profile/ in the run folder
    profile_steps: list[int] = field(default_factory=list)


@dataclass
class PlanConfig(TrainConfig, ReportTaskConfig):
    """Estimates memory, speed and cost of the run that `train` would start with these keys."""

    kind: str = "plan"
    target: str = "cpu"  # devices to plan for: v5p-512, h100x64, 2*v5e-256 (slices), cpu
    compile: bool = False  # also compile the step for the target and report XLA's memory allocation
    search: bool = False  # also search for mesh, remat policy and number of microbatches
    num_tokens: float | None = None  # training tokens for estimated days and cost; null: those of num_steps
    # JSON file of a scaling ladder for the recommended model size; null: the law of Hoffmann et al. 2022
    scaling_law: str | None = None
    # price of one device in dollars per hour; null: that of launch/planning/hardware.py
    price_per_device_hour: float | None = None
    output: str | None = None  # folder for the plan and its plot; null: plans/ in output_dir


@dataclass
class SweepConfig(TrainConfig):
    """Trains one run per trial of a hyperparameter search; all other keys apply to each trial."""

    kind: str = "sweep"
    sweep: SweepSearchConfig = field(default_factory=SweepSearchConfig)  # hyperparameter search


@dataclass
class CoordCheckConfig(ReportTaskConfig):
    """muP coordinate check: compares activation changes of the model at several widths."""

    kind: str = "coord_check"
    # values of embed_dim to compare; all other sizes scale with it
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    num_steps: int = 4  # optimizer steps per width, at the peak learning rate
    tolerance: float = 0.3  # maximum absolute slope for the check to pass
    output: str | None = None  # folder for results and plot; null: coord_check/ in output_dir


@dataclass
class ScalingLadderConfig(TrainConfig, ReportTaskConfig):
    """Trains runs of several sizes and lengths and fits a scaling law; all keys but `num_steps` apply to each."""

    kind: str = "scaling_ladder"
    # values of embed_dim to train; all other sizes scale with it
    widths: list[int] = field(default_factory=lambda: [64, 96, 128, 192])
    aspect_ratio: float | None = None  # width divided by the number of layers; null: model.num_layers at every width
    # training tokens per parameter, one run each; a single value fits a law of compute only
    tokens_per_param: list[float] = field(default_factory=lambda: [10.0, 20.0, 40.0])
    # training FLOPs to recommend a model size for; null: 100 times those of the largest run
    compute_budget: float | None = None
    output: str | None = None  # folder for results and plot; null: ladders/ in output_dir


@dataclass
class PrepareConfig(TaskConfig):
    kind: str = "prepare"


@dataclass
class EvaluateConfig(RunReaderConfig, ReportTaskConfig):
    kind: str = "evaluate"
    max_eval_batches: int = 0  # maximum batches per source; 0: data.max_eval_batches
    # JSONL files of multiple-choice problems to evaluate on, instead of the sources
    eval_tasks: list[str] = field(default_factory=list)
    limit: int = 0  # evaluate the first problems of each file only; 0: all
    limit_per_group: int = 0  # evaluate the first problems of each group in a file only; 0: all
    # special token before texts without a context; null: none, and their first token is not scored
    prefix: str | None = None
    dtype: Dtype | None = None  # dtype of the computation; null: that of the run


@dataclass
class GenerateConfig(RunReaderConfig, ReportTaskConfig):
    kind: str = "generate"
    prompt: str | None = None  # text to continue
    chat: str | None = None  # user message to answer, formatted with the run's chat template
    max_new_tokens: int = 256  # maximum number of tokens to generate
    temperature: float = 0.7  # sampling temperature; 0: greedy
    top_k: int = 0  # number of most probable tokens to sample from; 0: all
    top_p: float = 1.0  # probability mass of the most probable tokens to sample from (nucleus sampling); 1: all
    min_p: float = 0.0  # minimum probability of a token, relative to the most probable one; 0 disables it
    repetition_penalty: float = 1.0  # penalty factor for tokens that occurred before; 1 disables it
    stop: list[str] = field(default_factory=list)  # strings that end a completion; not printed
    diffusion_steps: int = 0  # denoising steps of a masked diffusion model; 0: one per token
    prompts: list[str] = field(default_factory=list)  # several prompts of any length
    prompt_file: str | None = None  # file of prompts, one per line
    num_samples: int = 1  # completions per prompt
    system: str | None = None  # system message of a chat
    # JSON file of a conversation to continue: a list of messages, or {messages, tools}
    messages_file: str | None = None


@dataclass
class ServeConfig(RunReaderConfig):
    kind: str = "serve"
    host: str = "127.0.0.1"  # address to listen on; one that other machines can reach requires api_key_env
    port: int = 8000  # TCP port; 0: any free port
    api_key_env: str | None = None  # environment variable with the API key that clients must send
    max_num_seqs: int = 16  # maximum requests generated concurrently
    # maximum tokens of prompt and completion; null: model.max_seq_len, at most 4096
    max_model_len: int | None = None
    max_queue_size: int = 64  # maximum waiting requests; more are rejected with status 429
    timeout: float = 600.0  # seconds until a request times out, including the time in the queue
    max_request_bytes: int = 1_000_000  # maximum size of a request body in bytes; larger ones get status 413
    shutdown_timeout: float = 10.0  # seconds to finish open requests after SIGTERM


@dataclass
class PredictConfig(RunReaderConfig):
    kind: str = "predict"
    texts: list[str] = field(default_factory=list)  # texts to score
    # files to score: .txt with a text per line, .jsonl with a text or a conversation per line
    files: list[str] = field(default_factory=list)
    output: str | None = None  # output file, .jsonl or .npy; null: JSON lines on standard output
    batch_size: int = 16  # texts per batch


@dataclass
class InspectConfig(RunReaderConfig, ReportTaskConfig):
    kind: str = "inspect"


@dataclass
class RunsConfig(ReportTaskConfig):
    kind: str = "runs"


@dataclass
class ReplayConfig(ReportTaskConfig):
    """Repeats the updates before a rollback (`loss_spikes.policy=rollback`); lists the rows with the largest loss."""

    kind: str = "replay"
    rollback: str | None = None  # rollback to replay, by the name STEP-N of its file in rollbacks/; null: the newest
    rows: int = 5  # rows of the batch to print, those with the largest loss


@dataclass
class ConvertConfig(RunReaderConfig):
    kind: str = "convert"
    input: str | None = None  # checkpoint to convert: hf:FOLDER, gguf:FILE, peft:FOLDER, or a run NAME or NAME@STEP
    output: str | None = None  # name of the new run, hf:FOLDER, gguf:FILE, or peft:FOLDER for adapters only
    # dtype of the output: float32, float16, bfloat16, for GGUF files also q8_0, q4_0; null: that of the input
    dtype: str | None = None
    max_shard_size_gb: float = 5.0  # maximum size of a weight file, in gigabytes


@dataclass
class StatusConfig(TaskConfig):
    """Shows the status of the newest job of a run."""

    kind: str = "status"


@dataclass
class LogsConfig(TaskConfig):
    kind: str = "logs"
    follow: bool = False  # wait for new lines


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

# Command-line aliases of task keys; `from` cannot be a Python field.
ALIASES: dict[str, dict[str, str]] = {"convert": {"from": "input", "to": "output"}}
