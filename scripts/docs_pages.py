"""Hooks of the documentation site: pages generated from the code, formulas as MathML, links to files of the repository.

MkDocs loads this file by the key ``hooks`` of ``mkdocs.yml`` and calls each ``on_...`` function during the build.
"""

import argparse
import os
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

import unbraid
from unbraid.cli.main import parser
from unbraid.config.reference import recipe_keys
from unbraid.losses import LOSSES
from unbraid.models import MODELS
from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS
from unbraid.train.optim import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# A code block or span, a displayed formula, or a formula in a line. Code comes first: its dollar signs are no formulas.
CODE_OR_FORMULA = re.compile(r"(```.*?```|`[^`\n]+`)|\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", flags=re.DOTALL)
LINK_OUT_OF_DOCS = re.compile(r"\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)")

PAGES_OF_ROOT_FILES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root that have a page, or an equal one, in the site."""


def on_files(files, config):
    """Add the generated pages, and the results of the benchmarks as files to download."""
    pages = {
        "keys.md": keys_page(),
        "commands.md": commands_page(),
        "api.md": api_page(),
    }
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        # In the repository these files lie above docs/, in the site next to its pages.
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[PAGES_OF_ROOT_FILES[name]] = text.replace("](docs/", "](")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted(RESULTS.glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn formulas into MathML, which browsers draw without a script, and point links at files of the site."""
    markdown = CODE_OR_FORMULA.sub(formula_as_mathml, markdown)
    return LINK_OUT_OF_DOCS.sub(lambda link: link_in_site(link, page.file.src_uri), markdown)


def formula_as_mathml(found):
    """Return a formula as MathML; return code as it is."""
    code, displayed, in_line = found.groups()
    if code is not None:
        return code
    if displayed is not None:
        return latex2mathml.converter.convert(displayed, display="block")
    return latex2mathml.converter.convert(in_line)


def link_in_site(link, page):
    """Return a link from a page to a file outside of docs/ as a link within the site, or as plain text.

    Raises:
        FileNotFoundError: If the repository has no such file.
    """
    target = (ROOT / "docs" / page).parent.joinpath(link[1], link[2]).resolve()
    if not target.exists():
        raise FileNotFoundError(f"docs/{page} links to {link[1]}{link[2]}, which does not exist.")
    name = target.relative_to(ROOT).as_posix()
    in_site = PAGES_OF_ROOT_FILES.get(name)
    if target.parent == RESULTS:
        in_site = f"results/{target.name}"
    if in_site is None:
        return f"] (`{name}` in the repository)"
    return f"]({os.path.relpath(in_site, Path(page).parent).replace(os.sep, '/')}{link[3] or ''})"


def commands_page():
    """Return the page of all commands: the text of their ``--help``."""
    os.environ["COLUMNS"] = "100"  # argparse wraps at the width of the terminal, which must not change the page
    lines = ["# Commands", "", "The same text as `unbraid COMMAND --help`.", ""]
    for name, command in sorted(all_commands(parser()).items()):
        lines += [f"## unbraid {name}", "", "```text", command.format_help().strip(), "```", ""]
    return "\n".join(lines)


def all_commands(top):
    """Return the parsers of all commands by name; those of `unbraid lab` are named `lab race` and so on."""
    found = {}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                inner = all_commands(command)
                found |= {f"{name} {inner_name}": inner_command for inner_name, inner_command in inner.items()}
                if not inner:
                    found[name] = command
    return found


def api_page():
    """Return the page of the Python API, which mkdocstrings fills from the docstrings."""
    public = [getattr(unbraid, name) for name in unbraid.__all__ if not name.startswith("_")]
    sections = {
        "Public names": ("All of these can be imported from `unbraid`.", public),
        "Models": ("`[model] name`, from `MODELS`.", MODELS.values()),
        "Losses": ("`[loss] name`, from `LOSSES`.", LOSSES.values()),
        "Clippers": ("`[clip] name`, from `CLIPPERS`.", CLIPPERS.values()),
        "Gradient transforms": ("`[[transform]] name`, from `TRANSFORMS`.", TRANSFORMS.values()),
        "Loss filters": ("`[[filter]] name`, from `FILTERS`.", FILTERS.values()),
        "Optimizers": ("`[optim] name`, from `OPTIMIZERS`.", OPTIMIZERS.values()),
        "Schedules": ("`[schedule] name`, from `SCHEDULES`.", SCHEDULES.values()),
    }
    lines = ["# Python API", "", "Generated from the docstrings.", ""]
    shown = set()
    for heading, (introduction, objects) in sections.items():
        lines += [f"## {heading}", "", introduction, ""]
        # Of the parts that a recipe names, only the constructor matters; public classes are shown with their methods.
        options = [] if heading == "Public names" else ["    options:", "      members: false"]
        for thing in objects:
            path = f"{thing.__module__}.{thing.__qualname__}"
            # A name that is both public and in a registry is shown once: two equal anchors would make links ambiguous.
            if path not in shown:
                lines += [f"::: {path}", *options, ""]
            shown.add(path)
    return "\n".join(lines)


def keys_page():
    """Return the page of all recipe keys, with type, default and meaning, from the signatures and docstrings."""
    keys = recipe_keys()
    lines = [
        "# Recipe keys",
        "",
        "Every key with its default, generated from the code. A key without a default must be",
    ]
    lines += ["set, or is optional where the meaning says so. [Recipes](recipes.md) shows how they fit together.", ""]
    for table in dict.fromkeys(key.table for key in keys):
        heading = f"[[{table}]]" if table in ("filter", "transform", "loss.terms") else f"[{table}]"
        # The anchor is given, because that of "[[filter]]" and "[filter]" would be the same word.
        lines += [f"## {heading} {{: #{table.replace('.', '-')} }}", ""]
        in_table = [key for key in keys if key.table == table]
        for component in dict.fromkeys(key.component for key in in_table):
            if component:
                lines += [f'### {table} name = "{component}"', ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
            for key in in_table:
                if key.component == component:
                    default = f"`{key.default}`" if key.default else ""
                    cells = (f"`{key.key}`", key.type, default, key.meaning)
                    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)
