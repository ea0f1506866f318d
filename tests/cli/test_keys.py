import pytest

from unbraid.cli.main import main
from unbraid.config.reference import recipe_keys


def test_every_key_is_listed_with_its_default_and_meaning(capsys):
    assert main(["keys"]) == 0

    lines = capsys.readouterr().out.splitlines()
    stripped = {line.strip() for line in lines}
    for key in recipe_keys():
        assert f"[{key.table}]" in lines
        assert any(line.startswith(key.key) and line.endswith(f"({key.type})") for line in stripped)
        assert key.meaning in stripped


def test_one_table_is_listed_alone(capsys):
    assert main(["keys", "clip"]) == 0

    output = capsys.readouterr().out
    assert output.startswith("[clip]\n")
    assert "percentile = 10.0  (number)" in output
    assert "[data]" not in output


def test_an_unknown_table_is_refused_with_the_tables_there_are(capsys):
    assert main(["keys", "optimm"]) == 2

    assert "The tables are data, model, " in (error := capsys.readouterr().err)
    assert "Did you mean 'optim'?" in error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "x.toml", "--lr", "1e-3"], "It is a key of the recipe: --set optim.lr=1e-3"),
        (["train", "x.toml", "--batch-size=8"], "It is a key of the recipe: --set data.batch_size=8"),
        (["train", "x.toml", "--clip.max_norm", "3"], "It is a key of the recipe: --set clip.max_norm=3"),
        (["train", "x.toml", "--epochs", "3"], "unbraid keys lists them."),
        (["doctor", "runs/a", "--lr", "1e-3"], "See: unbraid doctor --help"),
    ],
)
def test_an_unknown_option_is_answered_with_what_to_write(capsys, command, words):
    assert main(command) == 2

    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("unbraid: unrecognized arguments: --")
    assert line.endswith(words)
