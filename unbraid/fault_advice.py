"""Advice on each kind of fault, for the run that stops and for the doctor."""

from typing import NamedTuple

from unbraid.records import Outcome


class Advice(NamedTuple):
    """One sentence of advice, and the recipe key to change."""

    text: str
    key: str


ADVICE: dict[Outcome, Advice] = {
    "nonfinite_loss": Advice(
        "Replay the incident to find the example or layer at fault, and exclude its file.", "data.exclude"
    ),
    "nonfinite_gradient": Advice(
        "Replay the incident: it names the layer, and a precision in which the gradient is finite.", "train.precision"
    ),
    "over_limit": Advice(
        "Lower the learning rate, or raise the limit if the loss is expected to be this large.", "optim.lr"
    ),
    "out_of_memory": Advice("Use shorter excerpts, a smaller batch or a smaller model.", "data.excerpt_seconds"),
    "fp16_overflow": Advice('Use bf16, which has the range of fp32 (train.precision = "bf16").', "train.precision"),
}
"""By outcome of the step."""

ALL_BAD_ADVICE = Advice(
    "All examples of these steps are bad, so check the model and the loss, or lower the learning rate.", "optim.lr"
)
"""In place of the others where every example of several steps in a row is at fault."""
