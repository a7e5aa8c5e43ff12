"""The three trainers, each a subclass of TRL's."""
