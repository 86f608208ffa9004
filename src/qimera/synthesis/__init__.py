"""Samples from the teacher alone: generated, optimised directly, kept in a bank."""
