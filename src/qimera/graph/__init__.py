"""Graphs of ATen operations: what they hold, how they are written down and simplified."""
