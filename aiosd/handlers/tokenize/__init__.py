"""Tokens of a text as a model reads it, models/NAME/tokenize."""
