"""The student learns from the teacher."""
