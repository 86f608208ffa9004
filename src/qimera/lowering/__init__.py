"""A student's graph -> a graph of LiteRT's operations on int8, and the bytes of a file that holds it."""
