"""The fixtures of the recipes: text of a user, a small configuration."""

from tests.recipes.conftest import corpus, small

__all__ = ["corpus", "small"]
