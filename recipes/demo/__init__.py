"""The demo: its model, texts and labeler, and the settings of its stages."""
