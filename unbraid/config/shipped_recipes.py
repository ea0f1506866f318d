"""Find a recipe by its path, or one that comes with the package by its name; no torch."""

from pathlib import Path

from unbraid.errors import UserError, nearest


def find_recipe(path: Path) -> Path:
    """A recipe by its path, or one of ours by its name."""
    shipped = recipes_folder()
    candidates = [path, shipped / path.name, shipped / f"{path.name}.toml"] if path.parent == Path() else [path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        names = sorted(recipe.stem for recipe in shipped.glob("*.toml"))
        raise UserError(f"There is no recipe {path}; ours are {', '.join(names)}.{nearest(path.stem, names)}")
    return found


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, or at the top of a checkout."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
