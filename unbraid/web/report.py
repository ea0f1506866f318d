"""The report: a run as one file, to be sent, printed and opened anywhere, with no network."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unbraid.audio import read_audio
from unbraid.errors import AudioError, CheckpointError, UserError
from unbraid.io import write_atomically
from unbraid.records import RunDirectory, json_row
from unbraid.web.audio import all_sounds, as_mp3, examples, picture, worst_of_evaluation
from unbraid.web.chart_payloads import chart, scores
from unbraid.web.jsonl_tail import Followed
from unbraid.web.run_payloads import about, events, gains, judged, of_last_steps, overview
from unbraid.web.run_store import progress
from unbraid.web.server import STATIC, page

BUCKETS, PIECE_BUCKETS, N_PIECES = 500, 200, 6
"""Of all steps; and of those around each of the first findings, so that one can look at them closely."""

N_EXAMPLES = 8
SOUND_BYTES = 1_450_000
"""What sounds and spectrograms may take together, as they stand in the file; the rest are named and left out."""


def write_report(path: Path, out: Path) -> Path:
    """Write a run as one HTML file.

    Args:
        path: Its run directory.
        out: The file to write.

    Returns:
        The file.

    Raises:
        UserError: If it is no run directory, or the file cannot be written.
    """
    run = RunDirectory(path)
    if not path.is_dir() or not (run.steps.exists() or run.recipe.exists()):
        raise CheckpointError(f"{path} is no run directory: it holds neither {run.steps.name} nor {run.recipe.name}.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file to write, such as {out / 'report.html'}.")
    text = _whole(page(), _contents(path))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another file.") from error
    return out


def _contents(path: Path) -> dict[str, Any]:
    """All that the page would ask a server for."""
    run = Followed(path)
    while run.advance():
        pass
    listed = overview(path)
    drawn = chart(run.thinned(0, run.last_step, BUCKETS)) | {"scores": scores(run.validations, n_most=BUCKETS)}
    drawn |= progress(listed["id"], run)
    found = judged(path)
    heard, worst = examples(path), worst_of_evaluation(path)
    items = [{**item, "at": item["at"][-1:]} for item in heard["items"][:N_EXAMPLES]]
    if not items:
        worst = worst[:N_EXAMPLES]
    sounds, pictures = _embedded(path, items + worst)
    listed |= {"folder": ""}  # whoever gets the report has no use for it
    details = {"id": listed["id"], "events": events(run.events, run.n_events)}
    details |= of_last_steps(run.last_row, run.last_sampled)
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "run": listed | gains(run.validations),
        "series": drawn,
        "pieces": [_piece(run, finding["steps"]) for finding in found["findings"][:N_PIECES]],
        "judged": found,
        "details": details | about(path) | {"examples": heard | {"items": items}, "worst": worst},
        "sounds": sounds,
        "pictures": pictures,
    }


def _piece(run: Followed, steps: Sequence[int]) -> dict[str, Any]:
    """The curves around a finding, as far as the page goes to either side when it is shown."""
    first, last = steps
    around = max(20, math.ceil(0.25 * (last - first)))
    window = [max(0, first - around), last + around]
    return {"window": window} | chart(run.thinned(window[0], window[1], PIECE_BUCKETS))


def _embedded(path: Path, items: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Sounds and pictures of some items as addresses that hold them, as many as there is room for."""
    sounds: dict[str, str] = {}
    pictures: dict[str, str] = {}
    room = SOUND_BYTES
    for name in all_sounds(items):
        try:
            found = _embed("image/webp", picture(path / name)), _embed("audio/mpeg", as_mp3(*read_audio(path / name)))
        except AudioError:
            continue
        if (room := room - sum(map(len, found))) < 0:
            break
        pictures[name], sounds[name] = found
    return sounds, pictures


def _embed(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _whole(html: str, contents: dict[str, Any]) -> str:
    """The page with its styles, scripts and contents inside it; no other script may run, and nothing is loaded."""
    allowed: dict[str, list[str]] = {"style": [], "script": []}

    def inside(tag: str, name: str) -> str:
        text = (STATIC / name).read_text(encoding="utf-8").replace("</script", "<\\/script")
        allowed[tag].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        return f"<{tag}>{text}</{tag}>"

    data = json.dumps(json_row(contents), allow_nan=False, default=str).replace("<", "\\u003c")
    html = re.sub(r'<link rel="stylesheet" href="/static/([\w.]+)">', lambda found: inside("style", found[1]), html)
    html = re.sub(r'<script src="/static/([\w.]+)"></script>', lambda found: inside("script", found[1]), html)
    policy = f"default-src 'none'; script-src {' '.join(allowed['script'])}; style-src {' '.join(allowed['style'])}; "
    policy += "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    head = f'<meta http-equiv="content-security-policy" content="{policy}">'
    holder = f'<script type="application/json" id="report-data">{data}</script>'
    return html.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{head}', 1).replace(
        "<noscript>", f"{holder}\n<noscript>", 1
    )
