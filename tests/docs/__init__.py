"""The documents of the project: what they show is what the code prints."""
