"""Trained networks from every source -> the teacher."""
