"""A student -> files that other runtimes run, each compared with the student before it is handed over."""
