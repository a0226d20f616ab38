"""What a process does: one dataclass for each task. What carries them out is `launch/tasks/`."""

from dataclasses import dataclass, field

from configs.sweeps import SweepSearchConfig
from models.config import Dtype
from trainer.reliability.watchdog import WatchdogAction


@dataclass
class TaskConfig:
    """What a process does; the first word of the command line."""

    kind: str = ""


@dataclass
class TrainConfig(TaskConfig):
    kind: str = "train"
    num_steps: int = 1000  # optimizer updates in all, those before a resume included
    gradient_accumulation_steps: int = 1  # slices of a batch that are computed one after the other
    log_every: int = 10  # steps between lines where there is no terminal for a bar
    eval_every: int = 0  # steps between evaluations on held-out text; 0: at the end only
    sample_every: int = 0  # steps between samples; 0: at the end only
    sample_prompt: str = ""  # what samples go on from
    sample_tokens: int = 128  # length of a sample; 0: no samples
    sample_temperature: float = 0.7
    early_stopping_patience: int = 0  # evaluations without a better loss after which the run ends; 0: never
    early_stopping_min_delta: float = 0.0  # what counts as better, in nats
    watchdog_timeout: float = (
        1800.0  # without a step, an evaluation or a save done, after which the run hangs; 0: never
    )
    watchdog_action: WatchdogAction = WatchdogAction.warn
    profile_steps: list[int] = field(default_factory=list)  # [first, last]: a trace of these steps, in profile/


@dataclass
class PlanConfig(TrainConfig):
    """Of a run that `train` would start: what stands in `TrainConfig` is planned with."""

    kind: str = "plan"
    target: str = "cpu"  # KIND-COUNT: v5p-512, v6e-256, h100x64, 2*v5e-256 for slices, cpu
    compile: bool = False  # compile the step for the target, too, and say what XLA says
    search: bool = False  # look for the mesh, the remat and the microbatches, too
    num_tokens: float | None = None  # to train on, for days and dollars; null: num_steps of them
    scaling_law: str | None = None  # the .json of a ladder, to recommend a size by; null: that of Hoffmann et al. 2022
    price_per_device_hour: float | None = (
        None  # dollars an hour of one device; null: that of launch/planning/hardware.py
    )
    output: str | None = None  # the folder for plan and picture; null: RUNS/plans


@dataclass
class SweepConfig(TrainConfig):
    """Of runs that `train` would start, which differ in `sweep.parameters`: what stands in `TrainConfig` is of each."""

    kind: str = "sweep"
    sweep: SweepSearchConfig = field(default_factory=SweepSearchConfig)  # on the command line sweep.*


@dataclass
class CoordCheckConfig(TaskConfig):
    """Of a run that `train` would start, at several widths."""

    kind: str = "coord_check"
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])  # embed_dim; all else grows in proportion
    num_steps: int = 4  # at the peak of the learning rate
    tolerance: float = 0.3  # what a slope may be, up or down
    output: str | None = None  # the folder for numbers and picture; null: RUNS/coordinates


@dataclass
class ScalingLadderConfig(TrainConfig):
    """Runs of several sizes and lengths: what stands in `TrainConfig` is of each of them, `num_steps` aside."""

    kind: str = "scaling_ladder"
    widths: list[int] = field(default_factory=lambda: [64, 96, 128, 192])  # embed_dim; all else grows in proportion
    aspect_ratio: float | None = None  # width for each layer: num_layers follows; null: all as deep as the model
    # Each size is trained on so many tokens for a parameter, in a run each. A single one: a law of compute alone
    tokens_per_param: list[float] = field(default_factory=lambda: [10.0, 20.0, 40.0])
    compute_budget: float | None = None  # training FLOPs to recommend a size for; null: 100 times the largest run's
    output: str | None = None  # the folder for numbers and picture; null: RUNS/ladders


@dataclass
class PrepareConfig(TaskConfig):
    kind: str = "prepare"


@dataclass
class EvaluateConfig(TaskConfig):
    kind: str = "evaluate"
    max_eval_batches: int = 0  # batches of each source; 0: data.max_eval_batches
    eval_tasks: list[str] = field(default_factory=list)  # JSONL files of questions to answer, instead of sources
    limit: int = 0  # problems of each file, the first ones; 0: all
    limit_per_group: int = 0  # problems of each part of a file that has parts; 0: all
    prefix: str | None = None  # special token before texts without a context; null: their first token goes unscored
    dtype: Dtype | None = None  # of the computation; null: the run's


@dataclass
class GenerateConfig(TaskConfig):
    kind: str = "generate"
    max_new_tokens: int = 256
    temperature: float = 0.7  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)  # texts that end a completion; they are not printed
    diffusion_steps: int = 0  # passes of a masked diffusion model; 0: one for each token
    prompts: list[str] = field(default_factory=list)  # several at once, of any lengths
    prompt_file: str | None = None  # one prompt a line
    num_samples: int = 1  # completions of each prompt
    system: str | None = None  # with chat=: what the system says before it
    messages_file: str | None = None  # a conversation to go on with: JSON, a list of messages, or {messages, tools}


@dataclass
class ServeConfig(TaskConfig):
    kind: str = "serve"
    host: str = "127.0.0.1"  # another than this machine's own needs a key
    port: int = 8000  # 0: a free one
    api_key_env: str | None = None  # the environment variable that holds the key that clients must send
    max_num_seqs: int = 16  # answers that are written at once
    max_model_len: int | None = None  # tokens of a prompt and its answer; null: model.max_seq_len, at most 4096
    max_queue_size: int = 64  # requests that may wait for a slot; further ones get status 429
    timeout: float = 600.0  # seconds of a request, its wait included
    max_request_bytes: int = 1_000_000  # of a body; larger ones get status 413
    shutdown_timeout: float = 10.0  # seconds that answers get to be finished after SIGTERM


@dataclass
class PredictConfig(TaskConfig):
    kind: str = "predict"
    texts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # .txt: a text a line; .jsonl: a text or a conversation a line
    output: str | None = None  # a file to write, .jsonl or .npy; null: JSON lines on the terminal
    batch_size: int = 16  # texts that are read at once


@dataclass
class InspectConfig(TaskConfig):
    kind: str = "inspect"


@dataclass
class RunsConfig(TaskConfig):
    kind: str = "runs"


@dataclass
class ReplayConfig(TaskConfig):
    """Of a rollback (`loss_spikes.policy=rollback`): the updates before it, once more."""

    kind: str = "replay"
    rollback: str | None = None  # STEP-N, as its file in incidents/ is called; null: the newest
    rows: int = 5  # of its batch, those with the largest loss


@dataclass
class ConvertConfig(TaskConfig):
    kind: str = "convert"
    input: str | None = None  # from=: hf:FOLDER, gguf:FILE, peft:FOLDER, or a run's name, NAME@STEP for one step
    output: str | None = None  # to=: a run's name, hf:FOLDER, gguf:FILE, or peft:FOLDER for adapters alone
    # float32, float16, bfloat16, and q8_0, q4_0 in a GGUF file; null: as they came, else the model's dtype; of
    # adapters float32
    dtype: str | None = None
    max_shard_size_gb: float = 5.0  # size of a file in a folder, at most


@dataclass
class StatusConfig(TaskConfig):
    """Of the newest job of a run, as the two below."""

    kind: str = "status"


@dataclass
class LogsConfig(TaskConfig):
    kind: str = "logs"
    follow: bool = False  # stay, and show what comes


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
