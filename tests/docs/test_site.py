"""The documentation site builds without a warning, and all of its links lead somewhere."""

import ast
import html
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from documents import DOCUMENTS, ROOT

import unbraid
from unbraid.config.reference import recipe_keys
from unbraid.health.finding import FINDING_CODES, SEVERITIES


@dataclass
class Page(HTMLParser):
    """Anchors of a page, its links, and what a browser loads for it."""

    anchors: set = field(default_factory=set)
    links: list = field(default_factory=list)
    loaded: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; --strict turns each of MkDocs' warnings into a failure."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    found = {}
    for path in site.rglob("*.html"):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        found[path] = page
    return found


def is_inner(link):
    return not urlsplit(link).scheme and not urlsplit(link).netloc


def test_all_links_and_anchors_lead_somewhere(pages, site):
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the root of a server
            continue
        for link in filter(is_inner, page.links):
            file, anchor = urldefrag(link)
            target = (path.parent / unquote(file)).resolve() if file not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")

    assert len(pages) >= 18
    assert dead == []


def test_a_reader_needs_no_network(pages, site):
    for path, page in pages.items():
        assert [address for address in page.loaded if not is_inner(address)] == [], path.relative_to(site)
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_document_is_a_page(pages, site):
    names = {path.relative_to(site).as_posix() for path in pages}

    for name in DOCUMENTS:
        if name.startswith("docs/"):
            assert name.removeprefix("docs/").removesuffix(".md") + ".html" in names
    assert {"keys.html", "api.html", "commands.html", "changelog.html", "contributing.html"} <= names


def test_the_search_finds_what_is_on_the_pages(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    pages = {entry["location"].split("#")[0] for entry in index["docs"] if "AutoClip" in entry["text"]}

    assert {"training-step.html", "own-code.html", "api.html"} <= pages


def test_formulas_are_drawn_without_a_script(site):
    text = (site / "learn" / "gradient-descent.html").read_text(encoding="utf-8")

    assert text.count("<math") >= 40
    assert "$$" not in re.sub(r"<(code|script).*?</\1>", "", text, flags=re.DOTALL)


def test_every_public_name_is_on_the_page_of_the_api(pages, site):
    anchors = pages[site / "api.html"].anchors
    ends = {anchor.rsplit(".", 1)[-1] for anchor in anchors}

    assert [name for name in unbraid.__all__ if not name.startswith("_") and name not in ends] == []


def test_every_recipe_key_is_on_its_page_with_its_default(site):
    text = (site / "keys.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>\n<td><code>(.*?)</code></td>\n<td>.*?</td>\n<td>(.*?)</td>\n<td>(.*?)</td>", text)
    shown = Counter((key, html.unescape(re.sub(r"</?code>", "", default))) for key, default, _ in rows)

    assert shown == Counter((key.key, key.default) for key in recipe_keys())
    assert [key for key, _, meaning in rows if not meaning] == []


def test_every_finding_of_the_doctor_is_explained():
    sections = re.split(r"^### ", DOCUMENTS["docs/doctor.md"], flags=re.MULTILINE)[1:]

    assert sorted(section.split("\n")[0] for section in sections) == sorted(FINDING_CODES)
    for section in sections:
        assert re.match(r"\w+\n(Critical|Warning|Note)\b", section), section
        assert "- **Cause:**" in section, section
        assert "- **Cure:**" in section, section


def strings_in(node):
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def severities_in_code():
    """Severities that a finding can have, by its code, read from the functions that make findings."""
    found = defaultdict(set)
    for file in sorted((ROOT / "unbraid" / "health").glob("*.py")):
        functions = [
            node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
        ]
        for function in functions:
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Finding":
                    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
                    # A severity that is a variable gets its values somewhere in the same function.
                    severities = strings_in(keywords["severity"]) & set(SEVERITIES)
                    severities = severities or strings_in(function) & set(SEVERITIES)
                    for code in strings_in(keywords["code"]) & set(FINDING_CODES):
                        found[code] |= severities
    return found


def test_the_severities_of_findings_are_those_of_the_rules():
    found = severities_in_code()

    assert len(found) >= len(FINDING_CODES) - 2
    for code, severities in found.items():
        stated = re.search(rf"^### {code}\n([^.]*)\.", DOCUMENTS["docs/doctor.md"], flags=re.MULTILINE)[1]
        assert set(re.findall(r"\w+", stated.lower())) - {"or"} == severities, code


def test_links_lead_somewhere_in_the_repository_too():
    generated = {"keys.md", "commands.md", "api.md", "changelog.md", "contributing.md"}
    for name, text in DOCUMENTS.items():
        folder = (ROOT / name).parent
        links = [urldefrag(link)[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if is_inner(link)]
        dead = [link for link in links if link and link not in generated and not (folder / link).exists()]
        assert dead == [], name
