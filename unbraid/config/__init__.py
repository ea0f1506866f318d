"""Recipes: TOML and --set, checked against signatures; names turned into objects; what "auto" chooses."""
