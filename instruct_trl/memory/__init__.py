"""The dry run: how much memory a recipe will need, before it starts."""
