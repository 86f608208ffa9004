"""A finished run -> ``report.json`` for machines and ``report.html`` for people."""
