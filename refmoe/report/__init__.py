"""What is found, as a person or a program reads it."""
