"""Settings of every stage, and the recipes that choose them."""
