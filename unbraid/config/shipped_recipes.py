"""Find a recipe by its path, or one that comes with the package by its name; no torch."""

from pathlib import Path

from unbraid.errors import UserError, nearest


def find_recipe(path: Path) -> Path:
    """Return the path of a recipe, given its path or the name of a built-in recipe.

    Raises:
        UserError: If there is no such recipe.
    """
    shipped = recipes_folder()
    candidates = [path, shipped / path.name, shipped / f"{path.name}.toml"] if path.parent == Path() else [path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        names = sorted(recipe.stem for recipe in shipped.glob("*.toml"))
        raise UserError(
            f"There is no recipe {path}. Built-in recipes are {', '.join(names)}.{nearest(path.stem, names)}"
        )
    return found


def recipes_folder() -> Path:
    """Return the folder of the built-in recipes: inside an installed package, or at the top of a checkout."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
