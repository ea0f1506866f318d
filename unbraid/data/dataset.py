"""Mixtures of one split, made when they are asked for; every draw seeded by (seed, purpose, epoch, index, attempt)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from unbraid.data.mixing import AudioFault, ExcerptError, Mixture, mix, read_excerpt
from unbraid.data.tracks import Track, group_tracks
from unbraid.errors import DataError
from unbraid.records import ItemId
from unbraid.seeding import generator

MAX_ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The table ``[data]`` of a recipe.

    Attributes:
        name: Kind of data set.
        path: Where it lies.
        sample_rate: Rate that the model works at, in Hz.
        n_sources: Talkers in a mixture.
        kinds: One source of each of these kinds, in this order, such as ``["speech", "music"]``; a manifest's column
            ``kind`` names them. Empty mixes any talkers with each other.
        excerpt_seconds: Length of an example.
        batch_size: Examples in one optimizer step, over all processes and micro-batches together: the same recipe means
            the same training on one GPU and on eight.
        workers: Processes that prepare batches ahead; 0 prepares them in between.
        seed: Of every draw.
        resample: Whether recordings at other rates are brought to ``sample_rate``; refused otherwise.
        level_db: Mean power of the first talker, in dB of full scale.
        gains_db: The others are louder by so much, drawn between the two.
        noise: Folder or manifest of noises to add; None adds none.
        noise_snr_db: Talkers over noise in dB, drawn between the two.
        items_per_epoch: Mixtures that make an epoch; 0 takes as many as there are recordings.
        exclude: Files to leave out, as their paths appear in events.
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
        """Length of an example."""
        return round(self.excerpt_seconds * self.sample_rate)


@dataclass(frozen=True, slots=True)
class Key:
    """Which example is wanted, and how much it will count."""

    epoch: int
    index: int
    weight: float = 1.0


class Example(NamedTuple):
    """One mixture, where it came from, and what was wrong with what was drawn before it."""

    audio: Mixture
    item: ItemId
    weight: float
    faults: tuple[AudioFault, ...]


@dataclass(frozen=True)
class MixtureDataset(Dataset[Example]):
    """Mixtures of one split, made when they are asked for; example (epoch, index) is the same wherever it is made.

    Attributes:
        tracks: Recordings of the split, long enough.
        noises: Recordings of noise; empty for none.
        settings: How to mix.
        purpose: ``train``, ``valid`` or ``test``: part of the seed.
    """

    tracks: tuple[Track, ...]
    noises: tuple[Track, ...]
    settings: DataSettings
    purpose: str
    groups: dict[str, list[Track]] = field(init=False, repr=False, compare=False)
    places: dict[str, int] = field(init=False, repr=False, compare=False)
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    names_of_kind: dict[str, list[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        groups = group_tracks(self.tracks)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "names", tuple(groups))
        of_kind = {
            kind: [name for name, some in groups.items() if some[0].kind == kind] for kind in self.settings.kinds
        }
        object.__setattr__(self, "names_of_kind", of_kind)
        object.__setattr__(self, "places", {name: place for place, name in enumerate(groups)})

    def __len__(self) -> int:
        """Mixtures in an epoch."""
        return self.settings.items_per_epoch or len(self.tracks)

    def __getitem__(self, key: Key) -> Example:
        """Make one example, drawing again as often as an excerpt turns out to be bad.

        Raises:
            DataError: If nothing usable was drawn in `MAX_ATTEMPTS`.
        """
        faults: list[AudioFault] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = generator(self.settings.seed, self.purpose, key.epoch, key.index, attempt)
            talkers = self._draw_talkers(rng, key, attempt)
            try:
                audio, files = self._draw_mixture(rng, talkers)
            except ExcerptError as bad:
                faults.append(bad.fault)
                continue
            return Example(audio, ItemId(self.purpose, key.epoch, key.index, files), key.weight, tuple(faults))
        raise DataError(
            f"No usable audio in {MAX_ATTEMPTS} draws for one mixture of the {self.purpose} split; "
            f"the last: {faults[-1].message}"
        )

    def _draw_talkers(self, rng: np.random.Generator, key: Key, attempt: int) -> list[Track]:
        """First the recording whose turn it is in this epoch, so that all are heard; then others' at random."""
        n_tracks = len(self.tracks)
        turn = _order(self.settings.seed, self.purpose, key.epoch, n_tracks)[key.index % n_tracks]
        first = self.tracks[turn if attempt == 0 else rng.integers(n_tracks)]
        return [first, *(tracks[rng.integers(len(tracks))] for tracks in self._draw_others(rng, first))]

    def _draw_others(self, rng: np.random.Generator, first: Track) -> list[list[Track]]:
        """The recordings of each other talker: of each other kind, or simply of somebody else."""
        if self.settings.kinds:
            names = [self.names_of_kind[kind] for kind in self.settings.kinds if kind != first.kind]
            return [self.groups[some[rng.integers(len(some))]] for some in names]
        others = rng.choice(len(self.names) - 1, self.settings.n_sources - 1, replace=False)
        return [self.groups[self.names[other + (other >= self.places[first.group])]] for other in others]

    def _draw_mixture(self, rng: np.random.Generator, talkers: list[Track]) -> tuple[Mixture, tuple[str, ...]]:
        s = self.settings
        drawn = [*talkers, self.noises[rng.integers(len(self.noises))]] if self.noises else talkers
        starts = [rng.uniform(0, max(0.0, track.seconds - s.excerpt_seconds)) for track in drawn]
        gains = [0.0, *rng.uniform(*s.gains_db, len(talkers) - 1)]
        snr_db = rng.uniform(*s.noise_snr_db)
        for track in drawn:
            if str(track.path) in s.exclude:
                raise ExcerptError(AudioFault("AUDIO_EXCLUDED", str(track.path), "", in_excerpt_only=True))
        read = [
            read_excerpt(track, start, s.n_samples, s.sample_rate, keep_silent=s.silent == "keep")
            for track, start in zip(drawn, starts, strict=True)
        ]
        noise = read[-1] if self.noises else None
        order = [place for kind in s.kinds for place, talker in enumerate(talkers) if talker.kind == kind]
        order = order or list(range(len(talkers)))
        levels = [s.level_db + gains[place] for place in order]
        files = [drawn[place] for place in order] + drawn[len(talkers) :]
        return mix([read[place] for place in order], levels, noise, snr_db), tuple(str(track.path) for track in files)


@lru_cache(maxsize=4)
def _order(seed: int, purpose: str, epoch: int, n_tracks: int) -> npt.NDArray[np.int64]:
    return generator(seed, f"{purpose}-order", epoch).permutation(n_tracks)


def make_dataset(
    tracks: Sequence[Track], settings: DataSettings, purpose: str, *, noises: Sequence[Track] = ()
) -> MixtureDataset:
    """The mixtures of one split, after checking that they can be made.

    Args:
        tracks: Recordings of all splits.
        settings: How to mix.
        purpose: The split: ``train``, ``valid`` or ``test``.
        noises: Recordings of noise of all splits; those without a split go into every one.

    Raises:
        DataError: If there are too few speakers, no recording as long as an excerpt, or recordings at other rates where
            they may not be resampled.
    """
    chosen = tuple(track for track in tracks if track.split == purpose)
    if not chosen:
        found = ", ".join(sorted({track.split or "none" for track in tracks}))
        raise DataError(f"No recordings in the split {purpose!r} of {settings.path} (splits found: {found}).")
    _check_excluded(settings, [*tracks, *noises])
    noise = tuple(track for track in noises if track.split in ("", purpose))
    if noises and not noise:
        raise DataError(f"No noises in the split {purpose!r} of {settings.noise}.")
    _check_rates([*chosen, *noise], settings)
    sound = [track.seconds for track in chosen if not track.fault]
    if not sound or max(sound) < settings.excerpt_seconds:
        raise DataError(
            f"No recording in the split {purpose!r} of {settings.path} is as long as an excerpt of "
            f"{settings.excerpt_seconds:g} s (the longest: {max(sound, default=0):.2f} s); lower data.excerpt_seconds."
        )
    chosen = tuple(track for track in chosen if track.fault or track.seconds >= settings.excerpt_seconds / 2)
    if settings.kinds:
        chosen = _of_kinds(chosen, settings)
    n_speakers = len({track.group for track in chosen})
    if n_speakers < settings.n_sources:
        raise DataError(
            f"The split {purpose!r} of {settings.path} has {n_speakers} speaker{'s' * (n_speakers != 1)}, "
            f"but a mixture of {settings.n_sources} needs as many different ones."
        )
    return MixtureDataset(chosen, noise, settings, purpose)


def _check_excluded(settings: DataSettings, tracks: Sequence[Track]) -> None:
    known = {str(track.path) for track in tracks} if settings.exclude else set()
    for path in settings.exclude:
        if path not in known:
            raise DataError(
                f"data.exclude names {path}, which is none of the files in {settings.path}; see events.jsonl."
            )


def _of_kinds(tracks: Sequence[Track], settings: DataSettings) -> tuple[Track, ...]:
    """The recordings of the kinds that are mixed; whoever is heard in two kinds counts as two."""
    if len(settings.kinds) != settings.n_sources or len(set(settings.kinds)) < len(settings.kinds):
        raise DataError(
            f"data.kinds = {list(settings.kinds)} must name {settings.n_sources} different kinds, one for each source "
            "(data.n_sources)."
        )
    found = {track.kind for track in tracks}
    if missing := [kind for kind in settings.kinds if kind not in found]:
        listed = ", ".join(sorted(found - {""})) or "none"
        raise DataError(f"No recordings of kind {missing[0]!r} in {settings.path} (kinds found: {listed}).")
    return tuple(replace(t, group=f"{t.kind}/{t.group}") for t in tracks if t.kind in settings.kinds)


def _check_rates(tracks: Sequence[Track], settings: DataSettings) -> None:
    other = [track for track in tracks if not track.fault and track.sample_rate != settings.sample_rate]
    if other and not settings.resample:
        rates = ", ".join(str(rate) for rate in sorted({track.sample_rate for track in other}))
        raise DataError(
            f"{len(other)} of {len(tracks)} recordings are not at {settings.sample_rate} Hz but at {rates} Hz, "
            f"{other[0].path} the first; set data.resample = true, or another data.sample_rate."
        )
