"""A student -> a LiteRT file (TensorFlow Lite's format) for phones, compared with the student before it is there."""
