"""Training, validation and test mixtures, made on the fly; every random draw has its own seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from unbraid.data.excerpt import AudioFault, ExcerptError, read_excerpt
from unbraid.data.mixing import Mixture, mix
from unbraid.data.tracks import Track, group_tracks
from unbraid.errors import DataError
from unbraid.records import ItemId
from unbraid.seeding import generator

MAX_ATTEMPTS = 100
"""How often one example is drawn before the data set counts as unusable."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The table ``[data]`` of a recipe.

    Attributes:
        name: Kind of data set.
        path: Folder or manifest of the recordings.
        sample_rate: Sample rate of the model, in Hz.
        n_sources: Number of sources in a mixture.
        kinds: One source of each of these kinds, in this order, such as ``["speech", "music"]``; the column ``kind`` of
            a manifest names them. Empty mixes any speakers with each other.
        excerpt_seconds: Length of an example, in seconds.
        batch_size: Examples in one optimizer step, over all processes and micro-batches together, so that a recipe
            means the same training on one GPU and on eight.
        workers: Worker processes that prepare batches in advance; 0 prepares them in the main process.
        worker_timeout_seconds: How long to wait for a batch before the workers count as hung and are replaced; 0 waits
            for ever.
        seed: Seed of all random numbers of a run: the mixtures, the initial weights, and dropout.
        resample: Whether to resample recordings at other rates to ``sample_rate``; otherwise they are refused.
        level_db: Mean power of the first source, in dB of full scale.
        gains_db: Range, in dB, of the level of each other source relative to the first.
        noise: Folder or manifest of noises to add; if it is not set, none is added.
        noise_snr_db: Range, in dB, of the level of the sources together relative to the noise.
        items_per_epoch: Mixtures in an epoch; 0 makes as many as there are recordings.
        exclude: Files to skip, by their paths as events show them.
        silent: ``"redraw"`` replaces silent excerpts, ``"keep"`` trains on them.
    """

    path: Path | None = None
    name: str = "speakers"
    sample_rate: int = 8000
    n_sources: int = 2
    kinds: tuple[str, ...] = ()
    excerpt_seconds: float = 3.0
    batch_size: int = 1
    workers: int = 1
    worker_timeout_seconds: float = 300.0
    seed: int = 0
    resample: bool = False
    level_db: float = -25.0
    gains_db: tuple[float, float] = (-5.0, 0.0)
    noise: Path | None = None
    noise_snr_db: tuple[float, float] = (0.0, 15.0)
    items_per_epoch: int = 0
    exclude: tuple[str, ...] = ()
    silent: Literal["redraw", "keep"] = "redraw"

    @property
    def n_samples(self) -> int:
        """Length of an example in samples."""
        return round(self.excerpt_seconds * self.sample_rate)


@dataclass(frozen=True, slots=True)
class Key:
    """Identifies one example: the epoch, the index in the epoch, and the weight that the example will have."""

    epoch: int
    index: int
    weight: float = 1.0


class Example(NamedTuple):
    """One mixture, its id and weight, and the faults of the files that were drawn and rejected before it."""

    audio: Mixture
    item: ItemId
    weight: float
    faults: tuple[AudioFault, ...]


class MixtureDataset(Dataset[Example]):
    """Mixtures of one split, made on the fly; example (epoch, index) is the same in any worker, rank or resumed run.

    Args:
        tracks: Recordings of the split, long enough.
        noises: Recordings of noise; empty for none.
        settings: How to mix.
        purpose: ``train``, ``valid`` or ``test``; part of every seed.
    """

    def __init__(
        self, tracks: tuple[Track, ...], noises: tuple[Track, ...], settings: DataSettings, purpose: str
    ) -> None:
        self.tracks = tracks
        self.noises = noises
        self.settings = settings
        self.purpose = purpose
        self._tracks_by_group = group_tracks(tracks)
        self._groups = list(self._tracks_by_group)
        self._index_of_group = {group: index for index, group in enumerate(self._groups)}
        self._groups_by_kind: dict[str, list[str]] = {kind: [] for kind in settings.kinds}
        for group, tracks_of_group in self._tracks_by_group.items():
            kind = tracks_of_group[0].kind
            if kind in self._groups_by_kind:
                self._groups_by_kind[kind].append(group)

    def __len__(self) -> int:
        """Return the number of mixtures in an epoch."""
        return self.settings.items_per_epoch or len(self.tracks)

    def __getitem__(self, key: Key) -> Example:
        """Make one example, drawing again whenever an excerpt cannot be used.

        Raises:
            DataError: If `MAX_ATTEMPTS` draws gave nothing usable.
        """
        faults: list[AudioFault] = []
        for attempt in range(MAX_ATTEMPTS):
            # The attempt is part of the seed, so a redraw depends neither on the worker nor on earlier examples.
            rng = generator(self.settings.seed, self.purpose, key.epoch, key.index, attempt)
            talkers = self._draw_talkers(rng, key, attempt)
            try:
                audio, files = self._draw_mixture(rng, talkers)
            except ExcerptError as error:
                faults.append(error.fault)
                continue
            return Example(audio, ItemId(self.purpose, key.epoch, key.index, files), key.weight, tuple(faults))
        raise DataError(
            f"{MAX_ATTEMPTS} draws for one mixture of the {self.purpose} split gave no usable audio. "
            f"The last fault: {faults[-1].message}"
        )

    def _draw_talkers(self, rng: np.random.Generator, key: Key, attempt: int) -> list[Track]:
        """Draw one recording for each source, the first in turn so that an epoch uses all recordings."""
        n_tracks = len(self.tracks)
        order = _epoch_order(self.settings.seed, self.purpose, key.epoch, n_tracks)
        # A redraw takes any recording: the one whose turn it is may be the one that cannot be used.
        first = self.tracks[order[key.index % n_tracks] if attempt == 0 else rng.integers(n_tracks)]
        others = self._draw_other_groups(rng, first)
        return [first, *(tracks[rng.integers(len(tracks))] for tracks in others)]

    def _draw_other_groups(self, rng: np.random.Generator, first: Track) -> list[list[Track]]:
        """Return the recordings of one group for each other source: of each other kind, or of any other speaker."""
        if self.settings.kinds:
            candidates = [self._groups_by_kind[kind] for kind in self.settings.kinds if kind != first.kind]
            return [self._tracks_by_group[groups[rng.integers(len(groups))]] for groups in candidates]
        # Draw among all groups but the first's, by drawing one index less and stepping over the first's index.
        drawn = rng.choice(len(self._groups) - 1, self.settings.n_sources - 1, replace=False)
        first_index = self._index_of_group[first.group]
        return [self._tracks_by_group[self._groups[index + (index >= first_index)]] for index in drawn]

    def _draw_mixture(self, rng: np.random.Generator, talkers: list[Track]) -> tuple[Mixture, tuple[str, ...]]:
        """Draw noise, excerpts and levels, and mix; return the mixture and the files, sources first."""
        settings = self.settings

        # Make every draw before a file is read: the draws then do not depend on what the files contain.
        drawn = [*talkers, self.noises[rng.integers(len(self.noises))]] if self.noises else talkers
        starts = [rng.uniform(0, max(0.0, track.seconds - settings.excerpt_seconds)) for track in drawn]
        gains_db = [0.0, *rng.uniform(*settings.gains_db, len(talkers) - 1)]
        snr_db = rng.uniform(*settings.noise_snr_db)

        # An excluded file is rejected like a bad one, so that a run that excludes it and the run that rejected it make
        # the same next draws.
        for track in drawn:
            if str(track.path) in settings.exclude:
                raise ExcerptError(AudioFault("AUDIO_EXCLUDED", str(track.path), "", in_excerpt_only=True))
        excerpts = [
            read_excerpt(track, start, settings.n_samples, settings.sample_rate, keep_silent=settings.silent == "keep")
            for track, start in zip(drawn, starts, strict=True)
        ]
        noise = excerpts[-1] if self.noises else None

        # Sources stand in the order of ``kinds``; without kinds, in the order in which they were drawn.
        order = [i for kind in settings.kinds for i, talker in enumerate(talkers) if talker.kind == kind]
        order = order or list(range(len(talkers)))
        levels_db = [settings.level_db + gains_db[i] for i in order]
        mixture = mix([excerpts[i] for i in order], levels_db, noise, snr_db)
        files = [drawn[i] for i in order] + drawn[len(talkers) :]
        return mixture, tuple(str(track.path) for track in files)


@lru_cache(maxsize=4)  # each worker asks for the same epoch many times
def _epoch_order(seed: int, purpose: str, epoch: int, n_tracks: int) -> npt.NDArray[np.int64]:
    return generator(seed, f"{purpose}-order", epoch).permutation(n_tracks)


def make_dataset(
    tracks: Sequence[Track], settings: DataSettings, purpose: str, *, noises: Sequence[Track] = ()
) -> MixtureDataset:
    """Create the data set of one split, and check that its mixtures can be made.

    Args:
        tracks: Recordings of all splits.
        settings: How to mix.
        purpose: The split: ``train``, ``valid`` or ``test``.
        noises: Recordings of noise of all splits; those without a split are used in every split.

    Raises:
        DataError: If there are too few speakers, if no recording is as long as an excerpt, or if recordings have other
            sample rates and may not be resampled.
    """
    # Recordings and noises of the split.
    in_split = tuple(track for track in tracks if track.split == purpose)
    if not in_split:
        splits = ", ".join(sorted({track.split or "none" for track in tracks}))
        raise DataError(f"The split {purpose!r} of {settings.path} has no recordings (splits found: {splits}).")
    _check_excluded(settings, [*tracks, *noises])
    noises_in_split = tuple(track for track in noises if track.split in ("", purpose))
    if noises and not noises_in_split:
        raise DataError(f"The split {purpose!r} of {settings.noise} has no noises.")
    _check_rates([*in_split, *noises_in_split], settings)

    # Recordings of less than half an excerpt would be mostly padding. Faulty ones stay: drawing one is recorded.
    durations = [track.seconds for track in in_split if not track.fault]
    if not durations or max(durations) < settings.excerpt_seconds:
        raise DataError(
            f"No recording in the split {purpose!r} of {settings.path} is as long as an excerpt of "
            f"{settings.excerpt_seconds:g} s (the longest: {max(durations, default=0):.2f} s). Take "
            "shorter ones: data.excerpt_seconds in a recipe, --seconds in an evaluation."
        )
    usable = tuple(track for track in in_split if track.fault or track.seconds >= settings.excerpt_seconds / 2)

    # Enough different speakers.
    if settings.kinds:
        usable = _select_kinds(usable, settings)
    n_speakers = len({track.group for track in usable if not track.fault})
    if n_speakers < settings.n_sources:
        n_faulty = len({track.group for track in usable}) - n_speakers
        faulty = f" ({n_faulty} more only with files that cannot be used)" if n_faulty else ""
        raise DataError(
            f"The split {purpose!r} of {settings.path} has {n_speakers} speaker{'s' * (n_speakers != 1)}{faulty}, "
            f"but a mixture of {settings.n_sources} needs as many different ones."
        )
    return MixtureDataset(usable, noises_in_split, settings, purpose)


def _check_excluded(settings: DataSettings, tracks: Sequence[Track]) -> None:
    if not settings.exclude:
        return
    paths = {str(track.path) for track in tracks}
    for path in settings.exclude:
        if path not in paths:
            raise DataError(
                f"data.exclude names {path}, which is not a file of {settings.path}. Copy the path from events.jsonl."
            )


def _select_kinds(tracks: Sequence[Track], settings: DataSettings) -> tuple[Track, ...]:
    """Return the recordings of the kinds to mix, grouped by kind and speaker."""
    if len(settings.kinds) != settings.n_sources or len(set(settings.kinds)) < len(settings.kinds):
        raise DataError(
            f"data.kinds = {list(settings.kinds)} must name {settings.n_sources} different kinds, one for each source "
            "(data.n_sources)."
        )
    kinds_found = {track.kind for track in tracks}
    for kind in settings.kinds:
        if kind not in kinds_found:
            listed = ", ".join(sorted(kinds_found - {""})) or "none"
            raise DataError(f"{settings.path} has no recordings of kind {kind!r} (kinds found: {listed}).")
    # A speaker with recordings of two kinds becomes two groups, so that every group has one kind.
    return tuple(replace(t, group=f"{t.kind}/{t.group}") for t in tracks if t.kind in settings.kinds)


def _check_rates(tracks: Sequence[Track], settings: DataSettings) -> None:
    if settings.resample:
        return
    others = [track for track in tracks if not track.fault and track.sample_rate != settings.sample_rate]
    if others:
        rates = ", ".join(str(rate) for rate in sorted({track.sample_rate for track in others}))
        raise DataError(
            f"{len(others)} of {len(tracks)} recordings are not at {settings.sample_rate} Hz but at {rates} Hz, first "
            f"{others[0].path}. Set data.resample = true, or change data.sample_rate."
        )
