"""The recipes: the stages of InstructGPT, each one command."""
