"""How long a run trains, by which rules, and how often it is validated and saved."""

from dataclasses import dataclass
from typing import Any, Literal

from unbraid.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The table ``[train]`` of a recipe.

    Attributes:
        max_steps: Ends the run; 0 for no such end.
        max_minutes: Ends the run, over all its resumptions; 0 for no such end.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        compile: ``auto``, ``on`` or ``off``.
        accumulate: Micro-batches that a step's examples are split into, to save memory; the result is the same.
        ema: Share that stays in each step of the moving average of the weights, such as 0.999, which is then validated
            and saved as the model; 0 for none.
        on_bad_example: ``skip`` leaves the step out; ``rescue`` repeats it on its clean examples, for which an
            accelerator waits for the host in each step; ``stop`` ends the run.
        loss_upper_limit: A loss beyond this, by absolute value, is a fault as NaN is.
        compare_every_steps: How often several processes make sure that they hold the same weights, beside each
            checkpoint; 0 only there.
        also_log: Who else is told of every step: ``tensorboard``, ``wandb``, ``trackio``, or ``my_file:MyLogger``.
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
        every_steps: How often; 0 only at the end.
        n_items: How many mixtures.
        save_audio: Of how many of them the sound is kept, the first ones; 0 for none. An estimate of 3 s at 8 kHz takes
            0.1 MB, and that of up to 24 validations stays.
    """

    every_steps: int = 1000
    n_items: int = 100
    save_audio: int = 2


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """The table ``[save]`` of a recipe.

    Attributes:
        every_steps: How often; 0 only at the end.
        keep: How many of the newest checkpoints stay; the best stays beside them.
        incidents: How many bad steps are kept for `unbraid replay`, each with the model's weights.
    """

    every_steps: int = 1000
    keep: int = 2
    incidents: int = 5


@dataclass(frozen=True)
class Job:
    """What `fit` needs beside the state: where to write, how often, and what a checkpoint says of the run.

    Attributes:
        run: The run directory.
        train: Budget and rules.
        validate: How often.
        save: How often, how many.
        recipe: The resolved recipe, for the checkpoint.
        choices: What "auto" chose, for the checkpoint.
        n_files: Files in the training split, which the budget for bad ones is a share of.
    """

    run: RunDirectory
    train: TrainSettings
    validate: ValidateSettings
    save: SaveSettings
    recipe: dict[str, Any]
    choices: dict[str, Any]
    n_files: int = 0
