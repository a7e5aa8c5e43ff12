"""Ranking and text data: formats, checks, tokenisation, collation."""
