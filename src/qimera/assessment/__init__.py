"""What a bank and a student are worth, with and without real images."""
