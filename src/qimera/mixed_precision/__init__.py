"""Bits for each layer, from a budget."""
