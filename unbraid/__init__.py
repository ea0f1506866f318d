"""Trains networks that pull mixed sounds apart, and keeps that training healthy.

Nothing is re-exported here, so that ``import unbraid`` is instant: take what you need from its file, such as
``from unbraid.train.step import train_step`` or ``from unbraid.robust.clip import AutoClip``.
"""

__version__ = "0.1.0"
