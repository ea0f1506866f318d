"""What to do about skipped steps, for the run that stops and for the doctor; no torch."""

from typing import NamedTuple

from unbraid.records import Outcome


class Advice(NamedTuple):
    """What to do, in one sentence, and the recipe's key that it is done with."""

    words: str
    key: str


ADVICE: dict[Outcome, Advice] = {
    "nonfinite_loss": Advice(
        "Replay the incident to see which example or layer it is, and leave its file out.", "data.exclude"
    ),
    "nonfinite_gradient": Advice(
        "Replay the incident: it names the layer, and the precision in which it goes away.", "train.precision"
    ),
    "over_limit": Advice(
        "Lower the learning rate, or raise the limit if the loss is meant to be so large.", "optim.lr"
    ),
    "out_of_memory": Advice("Take shorter excerpts, a smaller batch or a smaller model.", "data.excerpt_seconds"),
    "fp16_overflow": Advice('Take bf16, which has the range of fp32 (train.precision = "bf16").', "train.precision"),
}
"""By outcome of the step."""
