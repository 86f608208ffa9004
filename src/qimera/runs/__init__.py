"""Runs and their directories: what the command line does."""
