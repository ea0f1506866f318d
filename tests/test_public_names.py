"""The names that ``import unbraid`` offers without importing them."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import unbraid


@pytest.mark.parametrize("name", unbraid.__all__)
def test_every_public_name_resolves_to_the_object_of_that_name(name):
    value = getattr(unbraid, name)

    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_import_unbraid_imports_no_torch_and_no_numpy():
    code = "import sys, unbraid; dir(unbraid); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_type_checker_sees_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(unbraid.__file__).read_text(encoding="utf-8"))
    typed = {
        name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("unbraid.")
        for name in node.names
    }

    assert typed == unbraid._MODULES
    assert sorted(typed) == unbraid.__all__


def test_no_public_name_is_also_a_submodule_which_would_replace_it():
    modules = {path.stem for path in Path(unbraid.__file__).parent.iterdir()}

    assert not modules & set(unbraid.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'sepparate'"):
        _ = unbraid.sepparate
    with pytest.raises(ImportError, match="sepparate"):
        from unbraid import sepparate  # noqa: F401


def test_dir_lists_the_public_names():
    assert set(unbraid.__all__) <= set(dir(unbraid))
