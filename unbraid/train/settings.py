"""The recipe's tables [train], [validate] and [save], and Job, which hands them to the loop."""

from dataclasses import dataclass
from typing import Any, Literal

from unbraid.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The table ``[train]`` of a recipe.

    Attributes:
        max_steps: Number of steps after which the run ends; 0 for no limit.
        max_minutes: Wall time after which the run ends, over all its resumptions; 0 for no limit.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``; ``auto`` chooses what the hardware multiplies natively.
        compile: ``auto``, ``on`` or ``off``; ``auto`` compiles if the budget is long enough to repay it.
        accumulate: Number of micro-batches in a step: more need less memory, and the result is the same.
        ema: Decay of a moving average of the weights, such as 0.999. The average is then validated and saved as the
            model; 0 for none.
        on_bad_example: What to do with a step that has a bad example. ``skip`` skips the step; ``rescue`` repeats it on
            its clean examples, which costs one synchronisation with the accelerator per step; ``stop`` ends the run.
        loss_upper_limit: A loss whose absolute value exceeds this is a fault, just as NaN is.
        compare_every_steps: How often several processes check that they hold the same weights, besides at each
            checkpoint; 0 for only at checkpoints.
        also_log: Further loggers: ``tensorboard``, ``wandb``, ``trackio``, or your own, ``my_file:MyLogger``.
    """

    max_steps: int = 0
    max_minutes: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    accumulate: int = 1
    ema: float = 0.0
    on_bad_example: Literal["skip", "rescue", "stop"] = "skip"
    loss_upper_limit: float = 999999.0
    compare_every_steps: int = 1000
    also_log: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ValidateSettings:
    """The table ``[validate]`` of a recipe.

    Attributes:
        every_steps: How often to validate; 0 for only at the end.
        n_items: Number of validation mixtures.
        save_audio: How many of the first validation mixtures to save as audio; 0 for none. An estimate of 3 s at 8 kHz
            takes 0.1 MB, and the estimates of up to 24 validations are kept.
    """

    every_steps: int = 1000
    n_items: int = 100
    save_audio: int = 2


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """The table ``[save]`` of a recipe.

    Attributes:
        every_steps: How often to save a checkpoint; 0 for only at the end.
        keep: How many of the newest checkpoints to keep; the best one is kept as well.
        incidents: How many bad steps to save for `unbraid replay`, each with the model's weights.
    """

    every_steps: int = 1000
    keep: int = 2
    incidents: int = 5


@dataclass(frozen=True)
class Job:
    """What `fit` needs besides the state: where to write, how often, and what a checkpoint records of the run.

    Attributes:
        run: The run directory.
        train: Budget and rules.
        validate: How often to validate.
        save: How often to save, and what to keep.
        recipe: The resolved recipe, for the checkpoint.
        choices: What "auto" chose, for the checkpoint.
        n_files: Files in the training split; the number of bad files that a run tolerates is a share of it.
    """

    run: RunDirectory
    train: TrainSettings
    validate: ValidateSettings
    save: SaveSettings
    recipe: dict[str, Any]
    choices: dict[str, Any]
    n_files: int = 0
