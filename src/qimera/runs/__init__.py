"""Run directories: making, continuing, comparing, exporting and reporting runs."""
