"""What recipes are called; shell completion reads it without loading anything else."""

RECIPE_NAMES = ("ptq", "fast", "best", "qimera", "paper", "gdfq", "images")
DEFAULT_RECIPE = "fast"
