"""The report: a run's page as one file that can be mailed, printed and opened without a network."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unbraid.audio import read_audio
from unbraid.errors import AudioError, CheckpointError, UserError
from unbraid.io import to_json_row, write_atomically
from unbraid.run_directory import RunDirectory
from unbraid.web.audio import (
    audio_names,
    encode_mp3,
    evaluation_examples,
    spectrogram_image,
    validation_examples,
)
from unbraid.web.followed_run import FollowedRun
from unbraid.web.payloads import (
    NO_IMPROVEMENT,
    chart,
    diagnosis,
    events,
    last_steps,
    overview,
    run_details,
    update_improvement,
)
from unbraid.web.run_store import series_payload
from unbraid.web.server import STATIC, page_html

BUCKETS = 500
"""Buckets for all steps of the run."""

ZOOM_BUCKETS = 200
MAX_ZOOMS = 6
"""The first findings come with the curves around them at a finer resolution."""

MAX_EXAMPLES = 8
MAX_AUDIO_BYTES = 1_450_000
"""Most bytes of audio and spectrograms together, in base64; the rest is listed without sound."""


def write_report(path: Path, out: Path) -> Path:
    """Write a run as one HTML file.

    Args:
        path: Run directory.
        out: File to write.

    Returns:
        The file written.

    Raises:
        UserError: If ``path`` is not a run directory, or the file cannot be written.
    """
    run = RunDirectory(path)
    if not path.is_dir() or not (run.steps.exists() or run.recipe.exists()):
        raise CheckpointError(
            f"{path} is not a run directory: it contains neither {run.steps.name} nor {run.recipe.name}."
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder. Give the name of a file, such as {out / 'report.html'}.")
    html = inline_page(page_html(), report_data(path))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, html)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}). Give another file.") from error
    return out


def report_data(path: Path) -> dict[str, Any]:
    """Return everything that the page would request from a server."""
    run = FollowedRun(path)
    while run.read_more():
        pass
    entry = {**overview(path), **update_improvement(NO_IMPROVEMENT, run.validations)}
    entry["folder"] = ""  # of no use to the recipient, and nobody else's business
    run_id = entry["id"]
    findings = diagnosis(path)

    # Audio is most of the size: only the latest estimates, and the evaluation in full only without validation examples.
    validation = validation_examples(path)[:MAX_EXAMPLES]
    for example in validation:
        example["estimates"] = example["estimates"][-1:]
    evaluation = evaluation_examples(path)
    if not validation:
        evaluation = evaluation[:MAX_EXAMPLES]
    audio, spectrograms = embed_audio(path, audio_names(validation + evaluation))

    details = {"id": run_id, "events": events(run.events, run.n_events)}
    details |= last_steps(run.last_row, run.last_sampled) | run_details(path)
    details |= {"validation_examples": validation, "evaluation_examples": evaluation}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "run": entry,
        "series": series_payload(run_id, run, 0, run.last_step, max_buckets=BUCKETS, max_validations=BUCKETS),
        "zooms": [zoomed(run, *finding["steps"]) for finding in findings["findings"][:MAX_ZOOMS]],
        "diagnosis": findings,
        "details": details,
        "audio": audio,
        "spectrograms": spectrograms,
    }


def zoomed(run: FollowedRun, first: int, last: int) -> dict[str, Any]:
    """Return the curves around a finding's steps, with the margin that `showSteps` in panels.js leaves."""
    margin = max(20, math.ceil(0.25 * (last - first)))
    window = [max(0, first - margin), last + margin]
    return {"window": window} | chart(run.downsample(window[0], window[1], ZOOM_BUCKETS))


def embed_audio(path: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return audio files and their spectrograms as data URLs by name, until `MAX_AUDIO_BYTES` are used up."""
    audio: dict[str, str] = {}
    spectrograms: dict[str, str] = {}
    n_bytes = 0
    for name in names:
        try:
            image = _data_url("image/webp", spectrogram_image(path / name))
            mp3 = _data_url("audio/mpeg", encode_mp3(*read_audio(path / name)))
        except AudioError:
            continue
        n_bytes += len(image) + len(mp3)
        if n_bytes > MAX_AUDIO_BYTES:
            break
        spectrograms[name] = image
        audio[name] = mp3
    return audio, spectrograms


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


# ---- One file


def inline_page(html: str, data: dict[str, Any]) -> str:
    """Return the page with its styles, scripts and data inside it.

    A content security policy allows these styles and scripts by their hashes, no others, and no requests at all.
    """
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inline(tag: str, attributes: str, text: str) -> str:
        text = text.replace("</script", "<\\/script")  # would end the element inside a string, too
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}{attributes}>{text}</{tag}>"

    def inline_style(match: re.Match[str]) -> str:
        return inline("style", "", (STATIC / match["name"]).read_text(encoding="utf-8"))

    def inline_script(match: re.Match[str]) -> str:
        if match["module"]:
            return inline("script", ' type="module"', bundle_modules(match["name"]))
        return inline("script", "", (STATIC / match["name"]).read_text(encoding="utf-8"))

    html = re.sub(r'<link rel="stylesheet" href="/static/(?P<name>[\w.]+)">', inline_style, html)
    html = re.sub(r'<script(?P<module> type="module")? src="/static/(?P<name>[\w.]+)"></script>', inline_script, html)

    # "<" is escaped, so that no text from the run can end the element that holds the data.
    json_text = json.dumps(to_json_row(data), allow_nan=False, default=str).replace("<", "\\u003c")
    data_element = f'<script type="application/json" id="report-data">{json_text}</script>'
    html = html.replace("<noscript>", f"{data_element}\n<noscript>", 1)
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )
    charset = '<meta charset="utf-8">'
    return html.replace(charset, f'{charset}\n<meta http-equiv="content-security-policy" content="{policy}">', 1)


IMPORT = re.compile(r'^import [^;]* from "\./(?P<name>[\w.]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(async )?(function|class|const)\b)", re.MULTILINE)


def bundle_modules(name: str) -> str:
    """Return a JavaScript module and those it imports as one, since a page opened from a file cannot import modules.

    The modules are concatenated, each after those it imports, without their import and export statements. So two of
    them must not declare the same name at the top level, and imports must not rename.
    """
    ordered: dict[str, str] = {}

    def add(module: str) -> None:
        source = (STATIC / module).read_text(encoding="utf-8")
        for match in IMPORT.finditer(source):
            if match["name"] not in ordered:
                add(match["name"])
        ordered[module] = EXPORT.sub("", IMPORT.sub("", source))

    add(name)
    return "\n".join(ordered.values())
